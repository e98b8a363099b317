"""The process that `polygraft up` leaves behind: owns the store and the head, restarts them, ends them on SIGTERM.

Run as `python -m polygraft.launch.supervisor SETTINGS.json`. It stays small: neither Ray nor torch is
imported here.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from polygraft.cluster.service import write_private
from polygraft.cluster.settings import Settings
from polygraft.cluster.store.base import StoreError
from polygraft.cluster.store.embedded import EmbeddedServer, free_port
from polygraft.cluster.store.watch import ENOUGH_BYTES
from polygraft.kernels.common.room import free_bytes
from polygraft.launch.children import Child, GaveUp, supervise
from polygraft.launch.leftovers import clear, remove_drafts
from polygraft.launch.processes import Identity
from polygraft.launch.program import Program
from polygraft.launch.run_folder import RunFolder, Supervision

_LOG = logging.getLogger(__name__)
_SOCKET_PATH = 107  # longest path of a unix socket
_RAY_PATH = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1234567")
_HEAD_GRACE_S = 45.0


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = Settings.model_validate_json(Path(sys.argv[1]).read_text())
    folder = RunFolder(settings.home)
    with folder.lock.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            _LOG.error("another supervisor owns %s", folder.path)
            return 1
        return _supervise(settings, folder)


def _supervise(settings: Settings, folder: RunFolder) -> int:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    clear(folder)
    if drafts := remove_drafts(settings.data, now=time.time()):
        _LOG.info("removed %d half-written files under %s", drafts, settings.data)
    scratch = _scratch()
    me = Identity.of(os.getpid())

    def record(children: Sequence[Child]) -> None:
        alive = tuple(Identity.of(child.pid) for child in children if child.alive)
        folder.supervise(Supervision(me, alive, str(scratch)))

    record(())
    try:
        supervise(_children(settings, folder, scratch), stop, on_change=record)
    except GaveUp as error:
        _LOG.error("%s", error)
        folder.enter(f"{error}")
        if error.told:
            folder.fail(f"{error}")
        return 1
    finally:
        with suppress(OSError):  # of a full disk: whoever reads the old record finds nobody alive
            record(())
        settings.service_path.unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
    folder.enter("stopped")
    return 0


def _children(settings: Settings, folder: RunFolder, scratch: Path) -> list[Child]:
    """The store, unless it is someone else's, and the head, which finds it through the settings it is given."""
    children: list[Child] = []
    if settings.store_url == "embedded":
        server = EmbeddedServer(settings.store_folder, port=free_port())
        children.append(EmbeddedStore(server, folder.note))
        settings = settings.model_copy(update={"store_url": server.url})
    write_private(folder.settings, settings.told)
    write_private(folder.ray_token, token_hex(32))

    def not_up() -> None:
        settings.service_path.unlink(missing_ok=True)

    head = Program(
        name="head",
        command=(sys.executable, "-m", "polygraft.launch.head", str(folder.settings), str(scratch)),
        log=folder.log("head"),
        is_ready=settings.service_path.exists,
        grace_s=_HEAD_GRACE_S,
        after=not_up,
    )
    return [*children, head]


@dataclass(slots=True)
class EmbeddedStore:
    """The embedded server as a `Child`."""

    server: EmbeddedServer
    note: Callable[[str], None] = lambda _: None
    name: str = "store"

    @property
    def pid(self) -> int:
        return self.server.pid

    @property
    def alive(self) -> bool:
        return self.server.alive

    @property
    def ready(self) -> bool:
        return self.server.alive  # it answered before `start` returned

    @property
    def excused(self) -> bool:
        return free_bytes(self.server.folder) < ENOUGH_BYTES

    def start(self) -> None:
        try:
            self.server.start()
        except StoreError as error:
            raise GaveUp(f"store: {error}", told=True) from None
        if self.server.cut is not None:
            self.note(
                f"the store's file ended in what was never acknowledged, as after a power cut; {self.server.cut} were "
                f"cut off and are kept in {self.server.cut.kept.name}"
            )
            self.server.cut = None

    def end(self) -> str:
        died = not self.server.alive
        self.server.stop()
        return f"died; see {self.server.folder / 'valkey.log'}" if died else "ended"


def _scratch() -> Path:
    """A new folder for Ray's sockets and logs, its path short enough for them."""
    shortest = _SOCKET_PATH - _RAY_PATH
    parent = tempfile.gettempdir()
    if len(parent) + len("/pg-12345678") > shortest:
        parent = "/tmp"
    return Path(tempfile.mkdtemp(prefix="pg-", dir=parent))


if __name__ == "__main__":
    sys.exit(main())
