"""What every test stands on: fixed seeds, a hermetic environment, no Ray in unit tests, and Ray's tests last."""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports Ray or transformers, which read these once.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin starve each other when several processes compute
        "RAY_AUTH_MODE": "disabled",  # else a stray token in the home folder decides
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # else every shutdown of Serve waits 30 s
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
)
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each: tiny matmuls only lose time in a second thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# In CI, and where POLYGRAFT_NO_SKIP is 1, a test of the compiled products that is skipped on a CPU that has what they
# need is a failure: else a missing compiler would go unseen.
_NO_SKIP = os.environ.get("CI") == "true" or os.environ.get("POLYGRAFT_NO_SKIP") == "1"
for _name in [name for name in os.environ if name.startswith("POLYGRAFT_")] + ["RAY_ADDRESS"]:
    os.environ.pop(_name, None)

gc.disable()  # until all is imported: what is made then stays

settings.register_profile("fixed", derandomize=True, deadline=None)  # same examples every run, on slow machines too
settings.load_profile("fixed")

_TESTS = Path(__file__).parent
_LAST = ("ray", "e2e", "nodes")  # folders whose tests may start Ray, in the order they run in after the unit tests
_SECONDS_A_TEST = 0.04  # in files that tests/seconds.txt does not name


def _seconds() -> dict[Path, float]:
    """How long each long file of tests takes by itself, as `tests/seconds.txt` says in whole seconds."""
    lines = (line.split() for line in (_TESTS / "seconds.txt").read_text().splitlines())
    return {_TESTS / name: float(seconds) for seconds, name in lines}


@pytest.hookimpl(tryfirst=True)  # the marks must be there before -m selects by them
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (folder := _folder(item)) in _LAST:
            item.add_marker(folder)
    items.sort(key=lambda item: _rank(_folder(item)))
    if "PYTEST_XDIST_WORKER" in os.environ:  # long files first: at the end no core waits for one that began last
        tests = Counter(item.path for item in items)
        expected = {path: count * _SECONDS_A_TEST for path, count in tests.items()} | _seconds()
        items.sort(key=lambda item: (_folder(item) in _LAST, -expected[item.path]))


def pytest_collection_finish() -> None:
    """What libraries and tests have made on import is no garbage: a collection took a second to look through it. Of
    what tests make little is, and with Python's own thresholds looking for it took a seventh of all time."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and _NO_SKIP and "compiler" in str(report.longrepr) and _cpu_has_bf16():
        report.outcome = "failed"
        report.longrepr = f"{report.longrepr}, but /proc/cpuinfo has avx512_bf16: install g++ 11 or later"
    return report


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(0)
        if torch.cuda.is_initialized():  # else torch.manual_seed would keep a traceback for each kind of device
            torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True)
def _no_ray_in_unit_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if _folder(request.node) in _LAST:
        return
    import ray

    def refuse(*_args: object, **_options: object) -> None:
        raise RuntimeError(f"a unit test must not start Ray; tests that need it lie in tests/{{{','.join(_LAST)}}}")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray._private.worker, "init", refuse)
    monkeypatch.setattr(ray._private.node.Node, "__init__", refuse)  # what ray.cluster_utils.Cluster starts


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What the root logger hears. Pytest's `caplog` is left out: its plugin looks at all loggers six times a test."""
    handler = BufferingHandler(10_000)
    logging.getLogger().addHandler(handler)
    yield handler.buffer
    logging.getLogger().removeHandler(handler)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests about company rather than about threads: tiny matmuls only lose time in a second one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _cpu_has_bf16() -> bool:
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "avx512_bf16" in cpu.read_text().split()


def _folder(item: pytest.Item) -> str:
    parts: Sequence[str] = item.path.relative_to(_TESTS).parts if item.path.is_relative_to(_TESTS) else ("",)
    return parts[0]


def _rank(folder: str) -> int:
    return _LAST.index(folder) + 1 if folder in _LAST else 0
