"""`/v1/cluster`: devices, packs, replicas and what waits, of all tenants together."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from polygraft.cluster.view import ClusterView, LoadView, view
from polygraft.serving.http.context import ApiDep, TenantDep
from polygraft.serving.http.documents import answers
from polygraft.serving.http.errors import ApiError
from polygraft.serving.messages import Load

router = APIRouter(prefix="/v1/cluster")


@router.get("", responses=answers(403))
async def cluster(api: ApiDep, tenant: TenantDep) -> ClusterView:
    """For the tenants that may read the metrics."""
    if tenant not in api.metrics_tenants:
        message = "the cluster is shown of all tenants together; ask with the key of one in the setting metrics_tenants"
        raise ApiError(403, message, code="not_allowed")
    loads = {
        str(replica): _load(load) for backbone in api.backbones for replica, load in backbone.gateway.loads.items()
    }
    snapshot = await run_in_threadpool(api.overview.look)
    return view(snapshot, loads, at=api.clock())


def _load(load: Load) -> LoadView:
    return LoadView(
        running=load.running,
        waiting=load.waiting,
        deferred=load.deferred,
        blocks=load.blocks,
        free_blocks=load.free_blocks,
        grafts=load.resident,
    )
