"""`/v1/cluster`: everybody's jobs, packs and replicas, for those who may see them."""

from __future__ import annotations

import httpx
import pytest

from polygraft.cluster.events import DeviceJoined, JobSubmitted, ReplicaOpened
from polygraft.cluster.model import ReplicaId
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Write
from polygraft.cluster.view import ClusterView
from tests.cluster.builders import make_device, make_job, make_replica
from tests.serving.http.conftest import Service, refusal

pytestmark = pytest.mark.anyio


async def test_the_cluster_is_shown_to_those_who_may_read_the_metrics(
    service: Service, ann: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    job = make_job("x", tenant="bob")
    opened = ReplicaOpened(record=make_replica("r0"), at=1.0)
    service.api.store.commit([], [DeviceJoined(record=make_device(), at=0.0), opened])
    service.api.store.commit([Write(keys.job(job.id), job, 0)], [JobSubmitted(record=job, at=1.0)])
    answer = await ann.get("/cluster")
    assert answer.status_code == 200
    shown = ClusterView.model_validate(answer.json())
    assert [device.id for device in shown.devices] == ["d"]
    assert [(one.job, one.tenant, one.reason) for one in shown.waiting] == [("ftjob-x", "bob", None)]
    (replica,) = shown.replicas
    (backbone,) = service.api.backbones
    load = backbone.gateway.loads[ReplicaId("r0")]
    assert replica.load is not None and (replica.load.running, replica.load.blocks) == (load.running, load.blocks)
    refusal(await bob.get("/cluster"), 403)
