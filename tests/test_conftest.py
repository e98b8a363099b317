"""The guards of conftest.py hold."""

import os

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


def test_the_environment_of_whoever_runs_the_tests_does_not_reach_them() -> None:
    assert not [name for name in os.environ if name.startswith("POLYGRAFT_") or name == "RAY_ADDRESS"]
