"""A Ray of the test's own, with a device or more, that leaves nothing behind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import ray

TRAIN = {  # a worker starts in seconds instead of half a minute
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
}


@contextmanager
def local_ray(environment: Mapping[str, str], *, devices: int = 1) -> Iterator[None]:
    """Processes that Ray starts get `environment`; Ray's own folder is short, since socket paths are."""
    home = tempfile.mkdtemp(prefix="pg-")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**TRAIN, **environment}.items():
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=2,
            resources={"device": devices},
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * 2**20,
            _temp_dir=home,
        )
        try:
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(home, ignore_errors=True)
