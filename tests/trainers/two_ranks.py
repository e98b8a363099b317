"""Runs packs over two ranks as Ray Train does, all processes anew after one of them died; run as a script by
test_ranks.py, so that the processes that it forks carry nothing of pytest.

two_ranks.py FOLDER {URL DATA KIND}...: packs of a backbone in FOLDER, each over the store at URL, whose files lie under
DATA. Rank 1 takes part in them to the end (KIND calm), is killed in its fourth step (kill), or raises in every forward
with the job `RAISES` (raise); a pack alone has one process and no ranks. Prints how often the processes began again, a
line a pack.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from polygraft.cluster.folders import Folders
from polygraft.cluster.store.connect import connect
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.stacks import Stacks
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers.lanes.gradient import GradientLane
from polygraft.trainers.lanes.protocol import Collect
from polygraft.trainers.leading import Beat, Close, LeadingRunner, follow
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.ranks import ProcessGroup
from polygraft.trainers.runner import PackRunner, PackStep
from polygraft.trainers.worker import PackWorker
from tests.trainers.submitted import PACK

RAISES = "ftjob-2"
MICRO_ROWS = 32
MOST = 3  # beginnings after which it gives up


class Dying(PackRunner):
    """Killed in its fourth step, once."""

    marker: Path

    def step(self) -> PackStep:
        if self.steps == 3 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step()


def lead(backbone: Backbone, url: str, data: Path) -> None:
    ranks = ProcessGroup()
    runner = LeadingRunner(backbone, max_rows=512, ranks=ranks)
    tokeniser = Tokeniser.load(backbone.folder)
    worker = PackWorker(PACK, runner, tokeniser, connect(url), folders=Folders(data), micro_rows=MICRO_ROWS)

    def heartbeat() -> None:
        ranks.tell(Beat())

    worker.run(heartbeat)
    ranks.tell(Close())


def second(backbone: Backbone, data: Path, kind: str) -> None:
    if kind == "raise":
        real = GradientLane.forward

        def forward(lane: GradientLane, stacks: Stacks, batches: Mapping[str, MicroBatch]) -> Sequence[Collect]:
            if RAISES in batches:
                raise RuntimeError("only here")
            return real(lane, stacks, batches)

        GradientLane.forward = forward  # type: ignore[assignment,method-assign]
    Dying.marker = data / "died"
    runner = (Dying if kind == "kill" else PackRunner)(backbone, max_rows=512, ranks=ProcessGroup())
    follow(runner, lambda: None)


def alone(backbone: Backbone, url: str, data: Path) -> bool:
    """Whether the only process came to its end."""
    if pid := os.fork():
        return os.waitpid(pid, 0)[1] == 0
    runner = PackRunner(backbone, max_rows=512)
    tokeniser = Tokeniser.load(backbone.folder)
    worker = PackWorker(PACK, runner, tokeniser, connect(url), folders=Folders(data), micro_rows=MICRO_ROWS)
    worker.run(lambda: None)
    os._exit(0)


def begin(backbone: Backbone, url: str, data: Path, kind: str, attempt: int) -> bool:
    """Both ranks until one is over; whether both came to the end."""
    if kind == "alone":
        return alone(backbone, url, data)
    pids = []
    for rank in range(2):
        pid = os.fork()
        if not pid:
            meeting = f"file://{data}/meeting-{attempt}"
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
            if rank == 0:
                lead(backbone, url, data)
            else:
                second(backbone, data, kind)
            os._exit(0)
        pids.append(pid)
    first, status = os.wait()
    pids.remove(first)
    if status:
        os.kill(pids[0], signal.SIGKILL)
    return os.waitpid(pids[0], 0)[1] == status == 0


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)  # a fork has no other threads
    backbone = Backbone.load(Path(sys.argv[1]), torch.float32, training=True)
    given = iter(sys.argv[2:])
    for url, data, kind in zip(given, given, given, strict=True):
        ended = (attempt for attempt in range(MOST) if begin(backbone, url, Path(data), kind, attempt))
        print(next(ended, MOST), flush=True)
