"""The address of a service's HTTP API, which one service of a user has at a time.

The head listens there late, and again after a restart: a second service could take the address meanwhile. So whoever
starts a service claims it first, by a lock that lives as long as the supervisor.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import psutil

_FREE = range(20_000, 32_768)  # above those of Ray's workers, below those that Linux gives to connections


class PortTaken(Exception):
    """Nobody can listen there; the message says who does, or why not, and what to do."""


@contextmanager
def claimed(host: str, port: int, home: Path) -> Iterator[tuple[int, TextIO]]:
    """The port, a free one for 0, and the open file whose lock is the claim; a process that inherits the file keeps it.
    Raises PortTaken."""
    port = port or _free_port(host)
    with _claims(host, port).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            other = file.read().strip()
            raise PortTaken(
                f"port: {host}:{port} is held by the service under {other}; stop it with `polygraft --home {other} "
                "down`, or choose another port with --port"
            ) from None
        check_free(host, port)
        file.truncate(0)
        file.write(f"{home}\n")
        file.flush()
        yield port, file


def check_free(host: str, port: int) -> None:
    """Raise PortTaken unless a program could listen there that shares the port with no other."""
    try:
        _bind(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = f"{host}:{port} is in use by {_listener(port)}; choose another with --port, or 0 for a free one"
        elif error.errno == errno.EACCES:
            reason = f"{host}:{port} is not for ordinary users; choose one from 1024 on with --port"
        else:
            reason = f"{host}:{port}: {error.strerror or error}; --host must be an address of this machine"
        raise PortTaken(f"port: {reason}") from None


def _bind(host: str, port: int) -> int:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are closing do not count
        probe.bind(address)
        return int(probe.getsockname()[1])


def _free_port(host: str) -> int:
    """One that the system gives nobody by itself: the head listens there only later."""
    for port in random.sample(_FREE, len(_FREE)):
        try:
            return _bind(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                reason = error.strerror or error
                raise PortTaken(f"host: {host}: {reason}; it must be an address of this machine") from None
    raise PortTaken(f"port: all from {_FREE.start} to {_FREE.stop - 1} are in use on {host}; name one with --port")


def _claims(host: str, port: int) -> Path:
    """The lock's file, in a folder of this user's where all their services look."""
    folder = Path(tempfile.gettempdir()) / f"polygraft-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PortTaken(f"port: {folder} is another user's, so that nothing can be claimed there; remove it")
    return folder / f"{host.replace('/', '_')}:{port}"


def _listener(port: int) -> str:
    """Who listens, as far as this user may know."""
    with suppress(psutil.Error, OSError):
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid:
                return f"{psutil.Process(one.pid).name()}, pid {one.pid}"
    return "another program"
