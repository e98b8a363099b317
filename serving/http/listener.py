"""The address of a machine's HTTP API: whoever starts ingresses listens there, and hands each of them the socket.

So connections wait at the socket while no ingress is there to take them: one that dies or is replaced refuses nobody.
Several on the machine take from one queue, each when it has time. The socket is handed over by a Unix socket, the door;
who may open the folder that it is in may have it.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path

BACKLOG = 2048  # connections that wait for an ingress; the system may allow fewer
_ASK_S = 10.0


class Listener:
    """Listens at `host` and `port` until it is closed, for those who ask at the path `door`. Raises OSError where
    nobody can listen."""

    def __init__(self, host: str, port: int, door: Path) -> None:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self._socket = socket.socket(family, kind, protocol)
        self._door = socket.socket(socket.AF_UNIX)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that close do not count
            self._socket.bind(address)
            self._socket.listen(BACKLOG)
            door.unlink(missing_ok=True)  # of a head that was killed
            self._door.bind(str(door))
            self._door.listen()
        except OSError:
            self.close()
            raise
        threading.Thread(target=self._hand_over, name="listener", daemon=True).start()

    def close(self) -> None:
        """Who was handed the socket goes on listening."""
        with suppress(OSError):  # it was not listening yet
            self._door.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the thread
        self._door.close()
        self._socket.close()

    def _hand_over(self) -> None:
        while True:
            try:
                asking, _ = self._door.accept()
            except OSError:
                return
            with asking, suppress(OSError):  # it went away meanwhile
                socket.send_fds(asking, [b"\0"], [self._socket.fileno()])


def handed(door: Path) -> socket.socket:
    """The listening socket, as this process's own. Raises OSError where nobody hands it over."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(_ASK_S)
        asking.connect(str(door))
        _, (number, *_), _, _ = socket.recv_fds(asking, 1, 1)
    found = socket.socket(fileno=number)
    found.set_inheritable(False)
    return found
