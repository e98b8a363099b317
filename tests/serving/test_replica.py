"""What Serve is told of a backbone's replicas."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import pytest
from ray.serve._private import autoscaling_state
from ray.serve._private.config import DeploymentConfig

from polygraft.cluster.settings import ServeSettings
from polygraft.serving.host import ReplicaPlan
from polygraft.serving.replica import replica_app
from tests.cluster.builders import make_backbone

URL = "redis://:well-kept@127.0.0.1:7/0"


class Told:
    """A policy that keeps what Serve gives it."""

    def __init__(self, **told: object) -> None:
        self.told = told


def test_serve_logs_how_many_replicas_are_found_without_the_store_s_password(
    tmp_path: Path, logged: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ReplicaPlan(
        backbone=make_backbone(),
        store_url=URL,
        data=tmp_path,
        device="cpu",
        settings=ServeSettings(),
        step_floor_s=0.0,
    )
    app = replica_app(plan, kind="cpu", scaler=f"{__name__}:Told")
    config = DeploymentConfig.from_proto_bytes(app._bound_deployment._deployment_config.to_proto_bytes())
    logger = logging.getLogger(__name__)
    logger.setLevel(logging.INFO)
    monkeypatch.setattr(autoscaling_state, "logger", logger)
    policy = cast(Told, autoscaling_state._resolve_policy_callable(config.autoscaling_config.policy))
    assert policy.told["store_url"] == URL
    (line,) = [one.getMessage() for one in logged if one.name == __name__]
    assert "redis://***@127.0.0.1:7/0" in line and "well-kept" not in line
