"""The ingress's side of reading grafts made elsewhere: one reader process, started when it is needed, killed when it
takes too long and started again.

It reads one folder at a time. A tenant may have two waiting, so that nobody else waits long for one tenant's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

from polygraft.cluster.model import GraftId, TenantId

_LOG = logging.getLogger(__name__)
_WAITING = 2
_IDLE_S = 60.0


class Refused(ValueError):
    """A folder that holds no graft for this backbone; the message says why."""


class NotSaved(OSError):
    """The graft is good, but the artefact folder did not take it; `full` when there is no room."""

    def __init__(self, *, full: bool) -> None:
        super().__init__("the graft could not be saved")
        self.full = full


class Busy(Exception):
    """The tenant has as many folders waiting as it may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A graft in the artefact folder, as `cluster/publish.py` publishes it."""

    graft: GraftId
    method: str
    fingerprint: str
    parameters: int
    context_length: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderPlan:
    """What the reader process is told: the backbone's files, and how much time and memory a folder may take."""

    backbone_folder: Path
    quantise: str | None
    memory_bytes: int
    seconds: float


class Adoption:
    """Folders in, saved grafts out. All on one event loop."""

    def __init__(self, plan: ReaderPlan) -> None:
        self._reader = _Reader(plan)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="graft-reader")
        self._waiting: Counter[TenantId] = Counter()
        self._idle: asyncio.TimerHandle | None = None

    async def read(self, tenant: TenantId, folder: Path, root: Path) -> Saved:
        """The graft in `folder`, saved under `root`. Raises Refused, NotSaved, Busy."""
        if self._waiting[tenant] >= _WAITING:
            raise Busy(f"{_WAITING} grafts of yours are being read; wait for one")
        if self._idle is not None:
            self._idle.cancel()
        loop = asyncio.get_running_loop()
        self._waiting[tenant] += 1
        try:
            return await loop.run_in_executor(self._thread, self._reader.read, folder, root)
        finally:
            self._waiting[tenant] -= 1
            if not self._waiting.total():
                self._idle = loop.call_later(_IDLE_S, self._thread.submit, self._reader.end)

    async def close(self) -> None:
        """End the process, after what it is reading."""
        if self._idle is not None:
            self._idle.cancel()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._reader.end)
        self._thread.shutdown()


class _Reader:
    """The process, as one thread uses it."""

    def __init__(self, plan: ReaderPlan) -> None:
        self._plan = plan
        self._process: subprocess.Popen[str] | None = None

    def read(self, folder: Path, root: Path) -> Saved:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        timer = Timer(self._plan.seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps([str(folder), str(root)]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            self.end()
            _LOG.warning("the reader of grafts ended (%s) over %s", process.returncode, folder)
            raise Refused(
                f"reading the graft took more than {self._plan.seconds:.0f} s, or more memory than there is for it"
            )
        return _saved(json.loads(line))

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.end()
            plan = self._plan
            told = [str(plan.backbone_folder), str(plan.memory_bytes)]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "polygraft.serving.reader", *told, *([plan.quantise] if plan.quantise else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._process


def _saved(answer: Mapping[str, str | int]) -> Saved:
    if "refused" in answer:
        raise Refused(str(answer["refused"]))
    if "failed" in answer:
        raise NotSaved(full=answer["failed"] == "full")
    return Saved(**answer)  # type: ignore[arg-type]  # the reader's words
