"""`/metrics` for Prometheus: what this ingress counted, what replicas said of themselves last, and the control plane.

Names are vLLM's with another prefix where vLLM has the metric. Labels are model, replica, ingress, and fixed sets of
words: nothing of a tenant's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry
from starlette.concurrency import run_in_threadpool

from polygraft.cluster.model import Snapshot
from polygraft.cluster.states import JobState, PackState, Reason, is_final
from polygraft.serving.http.context import Api, ApiDep, TenantDep
from polygraft.serving.http.documents import answers
from polygraft.serving.http.errors import ApiError
from polygraft.serving.http.meters import PREFIX
from polygraft.serving.http.overview import Overview
from polygraft.serving.messages import Load, Tally

router = APIRouter()
_KINDS = ("text/plain", "application/openmetrics-text")
W = TypeVar("W", bound=str)
_EOF = b"# EOF\n"  # ends OpenMetrics
_REPLICA = ("model_name", "replica")
_JOB_STATES = tuple(state for state in JobState if not is_final(state))
_PACK_STATES = tuple(state for state in PackState if not is_final(state))


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {kind: {"schema": {"type": "string"}} for kind in _KINDS}}, **answers(403)},
)
async def metrics(request: Request, api: ApiDep, tenant: TenantDep) -> Response:
    """In the format that the client accepts: Prometheus's text or OpenMetrics."""
    if tenant not in api.metrics_tenants:
        message = "metrics are of all tenants together; ask with the key of one in the setting metrics_tenants"
        raise ApiError(403, message, code="not_allowed")
    encode, kind = choose_encoder(request.headers.get("accept", ""))
    return Response(await run_in_threadpool(lambda: _all(api, encode)), headers={"Content-Type": kind})


def _all(api: Api, encode: Callable[[CollectorRegistry], bytes]) -> bytes:
    others = CollectorRegistry()
    others.register(_Found([*_replicas(api), *_control_plane(api.overview, api.overview.look(), api.meters.ingress)]))
    own = encode(api.meters.registry)
    return own.removesuffix(_EOF) + encode(others)


class _Found(Collector):
    """Metrics that are made when they are asked for."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _replicas(api: Api) -> Iterator[Metric]:
    """What replicas said last; one that is not connected says nothing."""
    loads = [
        (backbone.name, replica, load)
        for backbone in api.backbones
        for replica, load in sorted(backbone.gateway.loads.items())
    ]

    def gauge(name: str, about: str, value: Callable[[Load], float]) -> Metric:
        found = GaugeMetricFamily(PREFIX + name, about, labels=_REPLICA)
        for backbone, replica, load in loads:
            found.add_metric([backbone, replica], value(load))
        return found

    def counter(name: str, about: str, value: Callable[[Tally], float]) -> Metric:
        found = CounterMetricFamily(PREFIX + name, about, labels=_REPLICA)
        for backbone, replica, load in loads:
            found.add_metric([backbone, replica], value(load.tally))
        return found

    yield gauge("num_requests_running", "Requests in the batch.", lambda load: load.running)
    yield gauge("num_requests_waiting", "Requests in the queue.", lambda load: load.waiting)
    waits = GaugeMetricFamily(
        f"{PREFIX}num_requests_waiting_by_reason",
        "Requests in the queue: for their graft to be read or to fit (deferred), for a place in the batch (capacity).",
        labels=(*_REPLICA, "reason"),
    )
    for backbone, replica, load in loads:
        waits.add_metric([backbone, replica, "deferred"], load.deferred)
        waits.add_metric([backbone, replica, "capacity"], load.waiting - load.deferred)
    yield waits
    yield gauge(
        "kv_cache_usage_perc", "Share of the key-value cache in use.", lambda load: 1 - load.free_blocks / load.blocks
    )
    yield gauge("resident_grafts", "Grafts in memory.", lambda load: len(load.resident))
    yield gauge("resident_graft_bytes", "Bytes of grafts in memory.", lambda load: load.resident_bytes)
    yield counter("graft_loads", "Grafts read because a request named them.", lambda tally: tally.loads)
    yield counter("graft_load_seconds", "Time that reading grafts took.", lambda tally: tally.load_s)
    yield counter("graft_evictions", "Grafts that went to make room for others.", lambda tally: tally.evictions)
    yield counter("num_preemptions", "Requests sent back to the queue.", lambda tally: tally.preemptions)
    yield counter("prefix_cache_queries", "Tokens looked up among those computed.", lambda tally: tally.prefix_queries)
    yield counter("prefix_cache_hits", "Tokens that had been computed before.", lambda tally: tally.prefix_hits)
    yield counter("engine_steps", "Steps.", lambda tally: tally.steps)
    yield counter("engine_step_rows", "Rows of all steps.", lambda tally: tally.rows)
    yield counter("engine_step_seconds", "Time in steps.", lambda tally: tally.step_s)
    queued = SummaryMetricFamily(
        f"{PREFIX}request_queue_time_seconds",
        "From a request's arrival to its first place in a batch.",
        labels=_REPLICA,
    )
    for backbone, replica, load in loads:
        queued.add_metric([backbone, replica], load.tally.entered, load.tally.queued_s)
    yield queued


def _control_plane(overview: Overview, snapshot: Snapshot, ingress: str) -> Iterator[Metric]:
    jobs, packs = snapshot.jobs.values(), snapshot.packs.values()
    yield _gauges("jobs", "Jobs that are not over.", "state", Counter(job.state for job in jobs), _JOB_STATES)
    waiting = Counter(job.reason for job in jobs if job.waiting and job.reason is not None)
    yield _gauges("jobs_waiting_by_reason", "Jobs in no pack, by what for.", "reason", waiting, Reason)
    yield _gauges("packs", "Packs that are not over.", "state", Counter(pack.state for pack in packs), _PACK_STATES)
    kinds = {device.kind for device in snapshot.devices.values()}
    there, memory, free = (Counter(dict.fromkeys(kinds, 0)) for _ in range(3))
    for device in snapshot.devices.values():
        there[device.kind] += 1
        memory[device.kind] += device.bytes
        free[device.kind] += snapshot.free_bytes(device.id)
    yield _gauges("devices", "Devices.", "kind", there, kinds)
    yield _gauges("device_bytes", "Memory of devices that may be given out.", "kind", memory, kinds)
    yield _gauges("device_free_bytes", "Memory of devices that nobody holds.", "kind", free, kinds)
    replicas = Counter(replica.backbone for replica in snapshot.replicas.values())
    yield _gauges("replicas", "Replicas that are open.", "model_name", replicas, replicas)
    yield _counted("jobs_finished", "Jobs that ended since this ingress began.", "state", overview.finished, ingress)
    yield _counted("device_seconds", "Time of devices held, by what for.", "use", overview.device_seconds, ingress)


def _gauges(name: str, about: str, label: str, values: Mapping[W, float], words: Iterable[W]) -> Metric:
    """One of each of the words, 0 where nothing has it."""
    found = GaugeMetricFamily(PREFIX + name, about, labels=(label,))
    for word in sorted(words):
        found.add_metric([word], values.get(word, 0))
    return found


def _counted(name: str, about: str, label: str, values: Mapping[W, float], ingress: str) -> Metric:
    found = CounterMetricFamily(PREFIX + name, about, labels=(label, "ingress"))
    for word, value in sorted(values.items()):
        found.add_metric([word, ingress], value)
    return found
