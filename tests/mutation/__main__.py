"""`make mutants`: plants faults in the code that keeps promises, one at a time, and counts those that a test notices.

What keeps a promise to a tenant is tried whole, of everything else a sample that a seed draws. What was found is kept
under build/mutants, so that a run that is broken off goes on where it was: a fault that was noticed or is excused is
tried again only when its function changes (its file, where it is in none), one that was not whenever a file of tests
does. Decision 15 says why this is not mutmut.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tests.mutation.child import adopt, preload
from tests.mutation.covering import FOLDERS, KEPT, ROOT, Covered, covered, digest, test_files
from tests.mutation.faults import Fault, faults_in
from tests.mutation.trial import Outcome, Trial
from tests.mutation.warm import Warm, around, collected

EXCUSES = ROOT / "tests" / "mutation" / "equivalents.txt"
LEAST_NOTICED, MOST_EXCUSED = 0.90, 0.03
SAMPLE = 300
_ASLEEP = 6  # trials that do not compute beside those that do


@dataclass(frozen=True, slots=True)
class Part:
    """Sources, and the files of their tests, as patterns."""

    sources: tuple[str, ...]
    tests: tuple[str, ...]


WHOLE = (
    Part(("cluster/policy/*.py",), ("tests/cluster/policy/test_*.py",)),
    Part(
        (
            "serving/engine.py",
            "serving/gateway.py",
            "serving/residency.py",
            "serving/streams.py",
            "serving/suspects.py",
            "serving/tenants.py",
        ),
        ("tests/serving/test_*.py", "tests/serving/http/test_classify.py"),
    ),
    Part(("trainers/runner.py",), ("tests/trainers/test_*.py",)),
)
REST = Part(tuple(f"{folder}/*.py" for folder in FOLDERS), ("tests/**/test_*.py",))
# Triton's programs do not run on a CPU, and what only measures promises nothing.
LEFT_OUT = ("*/__init__.py", "kernels/*/gpu.py", "kernels/*/programs.py", "kernels/*/tuned.py", "*/bench.py")


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="these files, whole, as cluster/policy/*.py")
    parser.add_argument("--tests", nargs="+", metavar="PATTERN", help="ask these files of tests alone")
    parser.add_argument("--seed", type=int, default=0, help="draws the sample of the rest")
    parser.add_argument("--sample", type=int, default=SAMPLE, help="how many faults of the rest")
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), help="how many faults are tried at a time")
    parser.add_argument("--seconds", type=float, help="begin nothing new after so long; the next run goes on")
    asked = parser.parse_args(given)
    until = time.monotonic() + asked.seconds if asked.seconds else float("inf")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was begun is ended, too
    preload()
    kept = Kept(KEPT / "found.jsonl")
    chosen: list[Fault] = []
    for faults, tests in plan(asked.only, asked.seed, asked.sample):
        chosen.extend(faults)
        round_ = Round(faults, asked.tests or tests, kept, until=until, at_once=asked.at_once)
        if round_.untried():
            round_.run()
    return report(chosen, kept)


class Round:
    """Faults that are tried with the same tests."""

    def __init__(
        self, faults: Sequence[Fault], tests: Sequence[str], kept: Kept, *, until: float, at_once: int
    ) -> None:
        self._faults, self._kept, self._until, self._at_once = faults, kept, until, at_once
        self._sources = {fault.path: (ROOT / fault.path).read_text() for fault in faults}  # what is imported here
        self._files = test_files(tests)
        files = (digest(path.read_bytes()) for path in self._files)
        self._state = "".join(one[:2] for one in files)  # another one when a file of tests is
        self._excused = excused()

    def untried(self) -> list[Fault]:
        """What is excused is tried once, whatever becomes of the tests."""
        return [
            fault
            for fault in self._faults
            if self._kept.outcome(fault, self._state) is None
            and (fault.change not in self._excused or self._kept.last(fault) is None)
        ]

    def run(self) -> None:
        """First what can be planted in a process that has imported all, then the rest."""
        adopt()
        paths = {fault.path for fault in self.untried()}
        covering = covered(self._files, paths, self._at_once, self._until)
        if files := [test_file for test_file, one in covering.items() if paths & set(one.lines)]:
            self._run_warm(files, list(covering.values()))
        self._try(list(covering.values()), None)

    def _run_warm(self, files: Sequence[Path], covering: Sequence[Covered]) -> None:
        begun = os.fork()
        if begun == 0:
            adopt()
            try:
                collected(files, lambda warm: self._try(covering, warm))
            finally:
                sys.stdout.flush()
                os._exit(0)
        os.waitpid(begun, 0)
        self._kept.read()

    def _try(self, covering: Sequence[Covered], warm: Warm | None) -> None:
        with Trials(self._at_once, self._settle) as trials:
            for fault in self.untried():
                source = self._sources[fault.path]
                if time.monotonic() > self._until or source != (ROOT / fault.path).read_text():
                    continue
                if warm is None or warm.knows(fault, source, covering):
                    trials.begin(Trial(fault, source, covering, warm))

    def _settle(self, trial: Trial, outcome: Outcome) -> None:
        if outcome is Outcome.NOT_PLANTED:
            return
        fault = trial.fault
        self._kept.add(fault, self._state, outcome, trial.seconds)
        if not outcome.noticed:
            print(f"{outcome}: {fault.path}:{fault.line}\n  - {fault.before}\n  + {fault.after}", flush=True)


class Trials:
    """So many at a time; what comes of each is told."""

    def __init__(self, at_once: int, tell: Callable[[Trial, Outcome], None]) -> None:
        self._at_once, self._tell = at_once, tell
        self._running: list[Trial] = []

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            while kind is None and self._running:
                self._collect()
        finally:
            for trial in self._running:
                trial.drop()

    def begin(self, trial: Trial) -> None:
        """Returns when there is room for another one; a few that do not compute take none."""
        self._running.append(trial)
        while len(self._running) >= self._at_once + min(_ASLEEP, sum(trial.asleep for trial in self._running)):
            self._collect()

    def _collect(self) -> None:
        time.sleep(0.02)
        for trial in list(self._running):
            if (outcome := trial.outcome()) is not None:
                self._running.remove(trial)
                self._tell(trial, outcome)


def plan(only: Sequence[str] | None, seed: int, sample: int) -> Iterator[tuple[list[Fault], tuple[str, ...]]]:
    """Faults to try, and the files of tests to ask."""
    whole: set[str] = set()
    for part in WHOLE:
        paths = [path for path in sources(part) if only is None or any(fnmatch(path, one) for one in only)]
        whole.update(sources(part))
        yield [fault for path in paths for fault in faults_of(path)], part.tests
    rest = [path for path in sources(REST) if path not in whole]
    if only is not None:
        named = [path for path in rest if any(fnmatch(path, one) for one in only)]
        yield [fault for path in named for fault in faults_of(path)], REST.tests
        return
    faults = [fault for path in rest for fault in faults_of(path)]
    yield random.Random(seed).sample(faults, min(sample, len(faults))), REST.tests


def sources(part: Part) -> list[str]:
    every = (
        path.relative_to(ROOT).as_posix() for folder in ROOT.iterdir() if folder.is_dir() for path in _python(folder)
    )
    return sorted(
        path
        for path in every
        if any(fnmatch(path, one) for one in part.sources) and not any(fnmatch(path, one) for one in LEFT_OUT)
    )


def _python(folder: Path) -> Iterator[Path]:
    return iter(()) if folder.name.startswith(".") or folder.name == "build" else folder.rglob("*.py")


def faults_of(path: str) -> list[Fault]:
    return list(faults_in((ROOT / path).read_text(), path))


class Kept:
    """What came of each fault, a line of JSON each, the last one counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, tuple[str, str, Outcome]] = {}
        self._seconds: dict[str, float] = {}
        self.read()

    def read(self) -> None:
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                one = json.loads(line)
                self._found[one["fault"]] = one["source"], one["tests"], Outcome(one["outcome"])
                self._seconds[one["fault"]] = one.get("seconds", 0.0)

    def outcome(self, fault: Fault, tests: str) -> Outcome | None:
        """None where it has to be tried, again or for the first time."""
        source, asked, outcome = self._found.get(fault.id, ("", "", Outcome.UNTESTED))
        if source != _around(fault) or (not outcome.noticed and asked != tests):
            return None
        return outcome

    def last(self, fault: Fault) -> Outcome | None:
        source, _, outcome = self._found.get(fault.id, ("", "", Outcome.UNTESTED))
        return outcome if source == _around(fault) else None

    def seconds(self, fault: Fault) -> float:
        """Of processor time that the last trial took."""
        return self._seconds.get(fault.id, 0.0)

    def add(self, fault: Fault, tests: str, outcome: Outcome, seconds: float) -> None:
        source = _around(fault)
        self._found[fault.id], self._seconds[fault.id] = (source, tests, outcome), seconds
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = {"fault": fault.id, "source": source, "tests": tests, "outcome": outcome, "seconds": round(seconds, 2)}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _around(fault: Fault) -> str:
    """The digest of what has to change before a fault that was noticed is tried again."""
    text = (ROOT / fault.path).read_text()
    if (span := around(fault, text)) is not None:
        text = "".join(text.splitlines(keepends=True)[span.place.line - 1 : span.body.stop - 1])
    return digest(text.encode())


def excused() -> dict[tuple[str, str, str], str]:
    """Why, by path, line before and line after: `path :: before :: after :: why` a line."""
    lines = [line for line in EXCUSES.read_text().splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        parts = [part.strip() for part in line.split(" :: ")]
        if len(parts) != 4 or not all(parts):
            raise ValueError(f"{EXCUSES.name}: {line}: give path :: before :: after :: why")
        found[parts[0], parts[1], parts[2]] = parts[3]
    return found


def report(faults: Sequence[Fault], kept: Kept) -> int:
    """Print each file's share and the faults that nothing noticed; 0 where enough was noticed, 1 where not, 3 where
    some wait for the next run."""
    allowed, excuses, waiting = excused(), 0, 0
    seconds = 0.0
    tried: Counter[str] = Counter()
    noticed: Counter[str] = Counter()
    for fault in faults:
        outcome = kept.last(fault)
        if outcome is None:
            waiting += 1
            continue
        seconds += kept.seconds(fault)
        tried[fault.path] += 1
        excuse = not outcome.noticed and fault.change in allowed
        excuses += excuse
        noticed[fault.path] += outcome.noticed or excuse
        if not outcome.noticed and not excuse:
            print(f"{outcome}: {fault.path}:{fault.line}\n  - {fault.before}\n  + {fault.after}")
    for path in sorted(tried):
        print(f"{noticed[path]:5d} of {tried[path]:5d}  {noticed[path] / tried[path]:4.0%}  {path}")
    total, found = tried.total(), noticed.total()
    print(f"{found} of {total} noticed or excused, {excuses} of them excused; {waiting} not tried yet")
    print(f"{seconds:.0f} s of processor time for those tried")
    if waiting:
        return 3
    return 0 if found >= LEAST_NOTICED * total and excuses <= MOST_EXCUSED * total else 1


if __name__ == "__main__":
    sys.exit(main())
