"""Which tests run which lines: each file of tests is run once under coverage, and what came out is kept."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time

import coverage
import pytest

from tests.mutation.child import Child

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "mutants"
FOLDERS = ("cluster", "grafts", "kernels", "launch", "serving", "trainers", "tuning")
_ON_IMPORT = ""  # what runs while no test does
_LIMIT_S = 1200.0  # for one file of tests


@dataclass(frozen=True, slots=True)
class Covered:
    """What a file of tests runs: its digest and that of each source at that time, the tests by line of a source, the
    lines of a source that run while it is imported, and the seconds of processor time of each test that passes."""

    digest: str
    sources: Mapping[str, str] = field(default_factory=dict)
    lines: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    imported: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def holds(self, test_file: Path, paths: Container[str]) -> bool:
        """Whether neither the file nor what it runs of the sources at `paths` was changed since."""
        return self.digest == _digest(test_file) and all(
            _digest(ROOT / path) == kept for path, kept in self.sources.items() if path in paths
        )

    def tests(self, path: str, asked: Iterable[int]) -> set[str]:
        """Those that run one of the lines; all that run the file, where those run only when it is imported."""
        lines = self.lines.get(path, {})
        found = [test for line in asked for test in lines.get(str(line), ())]
        found = found or [test for tests in lines.values() for test in tests]
        return {test for test in found if test in self.seconds}


def digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


def _digest(path: Path) -> str:
    return digest(path.read_bytes())


def test_files(patterns: Iterable[str]) -> list[Path]:
    """Files of tests that start no Ray, in order of name."""
    found = {path for pattern in patterns for path in ROOT.glob(pattern)}
    left_out = {ROOT / "tests" / "ray", ROOT / "tests" / "e2e", ROOT / "tests" / "mutation"}
    return sorted(path for path in found if not left_out & set(path.parents))


def covered(
    files: Iterable[Path], paths: Container[str], at_once: int = 1, until: float = math.inf
) -> dict[Path, Covered]:
    """What each file runs of the sources at `paths`, from what was kept where that still holds; so many are measured at
    a time, and none is begun after `until`."""
    found: dict[Path, Covered] = {}
    running: dict[Path, Child] = {}
    try:
        for file in files:
            if (kept := _kept(file, paths)) is not None:
                found[file] = kept
                continue
            if time.monotonic() > until:
                break
            running[file] = _begin(file)
            _end(running, found, paths, at_once - 1)
        _end(running, found, paths, 0)
    finally:
        for child in running.values():
            child.end()
    return found


def _begin(file: Path) -> Child:
    _place(file).parent.mkdir(parents=True, exist_ok=True)
    return Child(lambda: _measure(file, _place(file)), cpu_s=_LIMIT_S, wall_s=10 * _LIMIT_S)


def _end(running: dict[Path, Child], found: dict[Path, Covered], paths: Container[str], most: int) -> None:
    """Wait until no more than `most` are running."""
    while True:
        for file, child in list(running.items()):
            if child.ended() is not None:
                del running[file]
                found[file] = _kept(file, paths) or Covered(_digest(file))
        if len(running) <= most:
            return
        time.sleep(0.02)


def _place(file: Path) -> Path:
    return KEPT / "tests" / f"{file.relative_to(ROOT).as_posix().replace('/', '.')}.json"


def _kept(file: Path, paths: Container[str]) -> Covered | None:
    if not (kept := _place(file)).exists():
        return None
    found = json.loads(kept.read_text())
    return one if "imported" in found and (one := Covered(**found)).holds(file, paths) else None


class _Watch:
    """Tells coverage which test runs, and notes how long each takes and whether it passes."""

    def __init__(self, measured: coverage.Coverage) -> None:
        self._measured = measured
        self._begun = 0.0
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> object:
        self._measured.switch_context(item.nodeid)
        begun = process_time()
        done = yield
        self.seconds[item.nodeid] = process_time() - begun
        self._measured.switch_context(_ON_IMPORT)
        return done

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.failed.add(report.nodeid)


def _measure(test_file: Path, kept: Path) -> int:
    include = [f"{ROOT}/{folder}/*" for folder in FOLDERS]
    measured = coverage.Coverage(data_file=None, config_file=False, include=include)
    watch = _Watch(measured)
    measured.start()
    pytest.main(["-q", "-p", "no:cacheprovider", str(test_file)], plugins=[watch])
    measured.stop()
    data = measured.get_data()
    paths = {Path(name).resolve().relative_to(ROOT).as_posix(): name for name in data.measured_files()}
    contexts = {path: data.contexts_by_lineno(name) for path, name in paths.items()}
    lines = {
        path: {str(line): tuple(sorted(found)) for line, tests in run.items() if (found := set(tests) - {_ON_IMPORT})}
        for path, run in contexts.items()
    }
    ran = {path: found for path, found in lines.items() if found}
    kept.write_text(
        json.dumps(
            {
                "digest": _digest(test_file),
                "sources": {path: _digest(ROOT / path) for path in ran},
                "lines": ran,
                "imported": {
                    path: sorted(n for n, tests in contexts[path].items() if _ON_IMPORT in tests) for path in ran
                },
                "seconds": {test: took for test, took in watch.seconds.items() if test not in watch.failed},
            }
        )
    )
    return 0
