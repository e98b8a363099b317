"""The processes that arms live in: started from here, told what to do a line at a time, and ended with the run."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import psutil
from assignment import Task
from harness import ArmFailed

from polygraft.grafts.runtime.process import device_environment

Command = Literal["load", "warm", "round", "check", "make", "profile"]
_PATIENCE_S = 1200.0
_TAIL = 400


class Server:
    """One child. It answers each command with a line of JSON on a pipe of its own; what it prints goes to a log."""

    def __init__(self, script: str, task: Task, patience_s: float = _PATIENCE_S) -> None:
        """An answer that takes longer than `patience_s` is none."""
        self._patience_s = patience_s
        self._log = Path(task.folder) / f"{Path(script).stem}-{task.kind}-{time.monotonic_ns()}.log"
        self._replies, theirs = os.pipe()
        environment = os.environ | {
            "OMP_NUM_THREADS": str(task.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **(device_environment(os.cpu_count() or 1) if task.ours else {}),
        }
        with self._log.open("wb") as log:
            python, path = task.python or sys.executable, Path(__file__).with_name(script)
            self._process = subprocess.Popen(
                [python, str(path), json.dumps(asdict(task)), str(theirs)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=(theirs,),
            )
        os.close(theirs)
        self._rest = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, command: Command) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{command}\n".encode())
            self._process.stdin.flush()
        except OSError as error:
            raise ArmFailed(f"{error}; {self._last_words()}") from None

    def hear(self) -> dict[str, object]:
        """The reply to the oldest command without one. Raises ArmFailed with what the child says went wrong."""
        until = time.monotonic() + self._patience_s
        while b"\n" not in self._rest:
            if not select.select([self._replies], [], [], max(0.0, until - time.monotonic()))[0]:
                raise ArmFailed(f"no answer in {self._patience_s:.0f} s")
            part = os.read(self._replies, 1 << 16)
            if not part:
                raise ArmFailed(f"its process ended; {self._last_words()}")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        reply: dict[str, object] = json.loads(line)
        if "error" in reply:
            raise ArmFailed(str(reply["error"]))
        return reply

    def ask(self, command: Command) -> dict[str, object]:
        self.tell(command)
        return self.hear()

    def pss(self) -> int:
        try:
            memory = psutil.Process(self._process.pid).memory_full_info()
        except psutil.Error:
            return 0
        return int(getattr(memory, "pss", memory.uss))  # systems without PSS: a lower bound

    def close(self) -> None:
        """End the child: it leaves at the end of its input, or is killed."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it is gone already
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._replies)

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-_TAIL:].strip() or "it said nothing"


class Servers:
    """An arm of one or more children that work at the same time."""

    def __init__(self, script: str, tasks: Sequence[Task]) -> None:
        self._all = [Server(script, task) for task in tasks]

    def load(self) -> str:
        return str(self._ask("load")[0]["dtype"])

    def warm(self) -> None:
        self._ask("warm")

    def round(self) -> float:
        """Tokens a second, from the first child's start to the last one's end."""
        replies = self._ask("round")
        starts, stops, tokens = ([_number(reply[key]) for reply in replies] for key in ("start", "stop", "tokens"))
        return sum(tokens) / (max(stops) - min(starts))

    def pss(self) -> int:
        return sum(server.pss() for server in self._all)

    def close(self) -> None:
        for server in self._all:
            server.close()

    def _ask(self, command: Command) -> list[dict[str, object]]:
        for server in self._all:
            server.tell(command)
        return [server.hear() for server in self._all]


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)
