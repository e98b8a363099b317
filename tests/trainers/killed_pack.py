"""Runs a pack's worker as Ray Train does, a new process after one that was killed; run as a script by
test_killed_pack.py, so that the processes that it forks carry nothing of pytest.

killed_pack.py FOLDER {URL DATA BYTES KIND}...: packs of a backbone in FOLDER, each over the store at URL, whose files
lie under DATA. A process that takes BYTES more than it began with is killed (KIND kill), or is refused them (KIND
refuse, RLIMIT_AS). Prints how many died, or raised for lack of memory, a line a pack.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from polygraft.cluster.folders import Folders
from polygraft.cluster.store.connect import connect
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.process import allocation_failed
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.worker import PackWorker
from tests.trainers.submitted import PACK

MOST = 8  # deaths after which it gives up
_SHORT = 3  # exit status of a worker that raised for lack of memory
_PAGE = resource.getpagesize()


def deaths(work: Callable[[], None], room: int, *, kill: bool) -> int:
    """How many processes died before one came to the end of the pack."""
    for died in range(MOST):
        address_space, resident = _memory(os.getpid())
        pid = os.fork()
        if not pid:
            if not kill:
                resource.setrlimit(resource.RLIMIT_AS, (address_space + room, address_space + room))
            try:
                work()
            except Exception as error:
                if not allocation_failed(error):
                    raise
                os._exit(_SHORT)
            os._exit(0)
        status = _watched(pid, resident + room if kill else None)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) != _SHORT:
            assert os.WEXITSTATUS(status) == 0, "the worker raised"
            return died
    return MOST


def _work(backbone: Backbone, tokeniser: Tokeniser, url: str, data: Path) -> None:
    runner = PackRunner(backbone, max_rows=4096)
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
    """Bytes of a process's address space, and those of no file that are resident."""
    size, resident, of_files = map(int, Path(f"/proc/{pid}/statm").read_text().split()[:3])
    return size * _PAGE, (resident - of_files) * _PAGE


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork has no other threads
    backbone = Backbone.load(Path(sys.argv[1]), torch.float32, training=True)
    tokeniser, given = Tokeniser.load(backbone.folder), iter(sys.argv[2:])
    for url, data, room, kind in zip(given, given, given, given, strict=True):
        work = partial(_work, backbone, tokeniser, url, Path(data))
        print(deaths(work, int(room), kill=kind == "kill"), flush=True)
