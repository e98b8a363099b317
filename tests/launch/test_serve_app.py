"""The Serve application as KubeRay builds it."""

from __future__ import annotations

import pytest

from polygraft.cluster.settings import BadSettings
from polygraft.launch.serve_app import build


def test_a_cluster_needs_a_store_that_all_its_nodes_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLYGRAFT_STORE_URL", raising=False)
    with pytest.raises(BadSettings, match="POLYGRAFT_STORE_URL"):
        build({})


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(BadSettings, match="replica_count"):
        build({"replica_count": 2})
