"""Runs a pack's worker as Ray Train does, a new process after one that was killed; run as a script by
test_killed_pack.py, so that the processes that it forks carry nothing of pytest.

killed_pack.py FOLDER URL DATA BYTES KIND: of a backbone in FOLDER, over the store at URL, whose files lie under DATA. A
process that takes BYTES more than it began with is killed (KIND kill), or is refused them (KIND refuse, RLIMIT_AS).
Prints how many died.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from polygraft.cluster.store.connect import connect
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers.folders import Folders
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.worker import PackWorker
from tests.trainers.submitted import PACK

MOST = 8  # deaths after which it gives up
_PAGE = resource.getpagesize()


def deaths(backbone: Backbone, url: str, data: Path, room: int, *, kill: bool) -> int:
    """How many processes died before one came to the end of the pack."""
    for died in range(MOST):
        address_space, resident = _memory(os.getpid())
        pid = os.fork()
        if not pid:
            if not kill:
                resource.setrlimit(resource.RLIMIT_AS, (address_space + room,) * 2)
            _work(backbone, url, data)
            os._exit(0)
        status = _watched(pid, resident + room if kill else None)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the worker raised"
            return died
    return MOST


def _work(backbone: Backbone, url: str, data: Path) -> None:
    runner = PackRunner(backbone, max_rows=4096)
    tokeniser = Tokeniser.load(backbone.folder)
    PackWorker(PACK, runner, tokeniser, connect(url), folders=Folders(data), micro_rows=128).run(lambda: None)


def _watched(pid: int, most: int | None) -> int:
    """The status that a process ended with; it is killed as soon as it holds more than `most` bytes."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        if most is not None and _memory(pid)[1] > most:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _memory(pid: int) -> tuple[int, int]:
    """Bytes of a process's address space, and those that are resident."""
    size, resident = Path(f"/proc/{pid}/statm").read_text().split()[:2]
    return int(size) * _PAGE, int(resident) * _PAGE


if __name__ == "__main__":
    folder, url, data, room, kind = sys.argv[1:]
    torch.set_num_threads(1)  # a fork has no other threads
    backbone = Backbone.load(Path(folder), torch.float32, training=True)
    print(deaths(backbone, url, Path(data), int(room), kill=kind == "kill"))
