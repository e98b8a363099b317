"""Records and events of older schemas, brought to the fields of the next before they are decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from polygraft.cluster.store.base import JSON
from polygraft.grafts.grammar import parse
from polygraft.grafts.spec import SpecError

Body = Mapping[str, JSON]


def _graft_1(body: Body) -> Body:
    """Schema 2 keeps the context length."""
    return {**body, "context_length": _context_length(str(body.get("method")))}


def _graft_published_1(body: Body) -> Body:
    graft = body.get("graft")
    return {**body, "graft": _graft_1(graft) if isinstance(graft, Mapping) else graft}


def _job_1(body: Body) -> Body:
    """Schema 2 keeps the class of the device."""
    return {**body, "device_class": None}


def _job_submitted_1(body: Body) -> Body:
    record = body.get("record")
    return {**body, "record": _job_1(record) if isinstance(record, Mapping) else record}


def _snapshot_1(body: Body) -> Body:
    return {**body, "jobs": _each(body.get("jobs"), _job_1)}


def _on_devices_1(body: Body) -> Body:
    """Schema 2 of what holds a device: a set of them, and the bytes of each, of which none were counted before."""
    return {**_without(body, "device"), "devices": [body.get("device")], "bytes": 0}


def _replica_1(body: Body) -> Body:
    return {**_on_devices_1(body), "actor": ""}


def _replica_opened_1(body: Body) -> Body:
    """Schema 2 holds the record."""
    record = {"id": body.get("replica"), "opened_at": body.get("at"), **_without(body, "replica", "at")}
    return {"record": _replica_1(record), "at": body.get("at")}


def _device_1(body: Body) -> Body:
    """Schema 2 says what a device is. It was a node, of which nothing else was known: it has nothing to give, and is
    found anew."""
    nothing: Body = {"node": body.get("id"), "kind": "cpu", "index": 0, "cores": 0, "bytes": 0, "speed": 0.0}
    return {"id": body.get("id"), **nothing}


def _device_joined_1(body: Body) -> Body:
    return {"record": _device_1({"id": body.get("device")}), "at": body.get("at")}


def _snapshot_2(body: Body) -> Body:
    packs, replicas, devices = body.get("packs"), body.get("replicas"), body.get("devices")
    return {
        **body,
        "packs": _each(packs, _on_devices_1),
        "replicas": _each(replicas, _replica_1),
        "devices": _each(devices, _device_1),
    }


def _snapshot_3(body: Body) -> Body:
    """Schema 4 has backbones, of which the service tells anew, and when they are unloaded."""
    limits = body.get("limits")
    never = {**limits, "unload_s": 0.0} if isinstance(limits, Mapping) else limits
    return {**body, "limits": never, "backbones": []}


def _job_2(body: Body) -> Body:
    """Schema 3 has a priority, may ask for several devices, and knows when it came into its pack and where it moves."""
    spec = body.get("spec")
    asked = {**spec, "priority": 0, "devices": 1} if isinstance(spec, Mapping) else spec
    return {**body, "spec": asked, "moving_to": None, "admitted_at": None, "blocked_at": None}


def _job_submitted_2(body: Body) -> Body:
    record = body.get("record")
    return {**body, "record": _job_2(record) if isinstance(record, Mapping) else record}


def _job_3(body: Body) -> Body:
    """Schema 4 may have a test file, and scores beside losses."""
    spec = body.get("spec")
    asked = {**spec, "test_file": None} if isinstance(spec, Mapping) else spec
    return {**body, "spec": asked, "judged": _nothing_judged()}


def _job_submitted_3(body: Body) -> Body:
    record = body.get("record")
    return {**body, "record": _job_3(record) if isinstance(record, Mapping) else record}


def _job_succeeded_1(body: Body) -> Body:
    return {**body, "judged": _nothing_judged()}


def _nothing_judged() -> Body:
    names = ("exact_match", "token_f1", "accuracy", "accuracy_norm", "macro_f1")
    none: Body = dict.fromkeys(names)
    return {"before": none, "after": none, "test_loss": None, "test": none}


def _job_4(body: Body) -> Body:
    """Schema 5 may train a classifier."""
    spec = body.get("spec")
    return {**body, "spec": {**spec, "kind": "supervised"} if isinstance(spec, Mapping) else spec}


def _job_submitted_4(body: Body) -> Body:
    record = body.get("record")
    return {**body, "record": _job_4(record) if isinstance(record, Mapping) else record}


def _job_5(body: Body) -> Body:
    """Schema 6 may train up to a rung, and go on from one."""
    spec = body.get("spec")
    return {**body, "spec": {**spec, "rung": None} if isinstance(spec, Mapping) else spec}


def _job_submitted_5(body: Body) -> Body:
    record = body.get("record")
    return {**body, "record": _job_5(record) if isinstance(record, Mapping) else record}


def _snapshot_7(body: Body) -> Body:
    return {**body, "jobs": _each(body.get("jobs"), _job_5)}


def _snapshot_4(body: Body) -> Body:
    limits, jobs = body.get("limits"), body.get("jobs")
    found = [job for job in jobs if isinstance(job, Mapping)] if isinstance(jobs, list) else []
    ended = [job for job in found if job.get("finished_at") is not None]
    more = {"opening_s": 20.0, "moving_s": 5.0, "overtake_s": 60.0, "patience_s": 600.0, "tenant_jobs": 0}
    return {
        **body,
        "jobs": _each(jobs, _job_2),
        "over": [str(job["id"]) for job in sorted(ended, key=lambda job: (job["finished_at"], job["id"]))],
        "limits": {**limits, **more} if isinstance(limits, Mapping) else limits,
        "paces": [],
    }


def _snapshot_5(body: Body) -> Body:
    return {**body, "jobs": _each(body.get("jobs"), _job_3)}


def _snapshot_6(body: Body) -> Body:
    return {**body, "jobs": _each(body.get("jobs"), _job_4)}


def _snapshot_8(body: Body) -> Body:
    """Schema 9 says which limits a setting gave, and which nodes drain, of which the cluster tells anew."""
    limits = body.get("limits")
    given = {"given": [], **limits} if isinstance(limits, Mapping) else limits
    return {**body, "limits": given, "draining": []}


def _backbone_unloading_1(body: Body) -> Body:
    """Schema 2 says when it was last asked: before."""
    return {**body, "asked_at": body.get("at")}


def _each(records: JSON, upgrade: Callable[[Body], Body]) -> JSON:
    if not isinstance(records, list):
        return records
    return [upgrade(one) if isinstance(one, Mapping) else one for one in records]


def _without(body: Body, *names: str) -> Body:
    return {name: value for name, value in body.items() if name not in names}


@lru_cache(maxsize=1024)
def _context_length(method: str) -> int:
    """0 for an imported graft that is described in words: the engine asks the graft, and refuses what does not fit."""
    try:
        return parse(method).context_length
    except SpecError:
        return 0


# From (type, schema) to the body of schema + 1.
UPGRADES: Mapping[tuple[str, int], Callable[[Body], Body]] = {
    ("BackboneUnloading", 1): _backbone_unloading_1,
    ("DeviceJoined", 1): _device_joined_1,
    ("Graft", 1): _graft_1,
    ("GraftPublished", 1): _graft_published_1,
    ("Job", 1): _job_1,
    ("Job", 2): _job_2,
    ("Job", 3): _job_3,
    ("Job", 4): _job_4,
    ("Job", 5): _job_5,
    ("JobStarted", 1): _job_1,
    ("JobSubmitted", 1): _job_submitted_1,
    ("JobSubmitted", 2): _job_submitted_2,
    ("JobSubmitted", 3): _job_submitted_3,
    ("JobSubmitted", 4): _job_submitted_4,
    ("JobSubmitted", 5): _job_submitted_5,
    ("JobSucceeded", 1): _job_succeeded_1,
    ("Pack", 1): _on_devices_1,
    ("PackOpening", 1): _on_devices_1,
    ("Replica", 1): _replica_1,
    ("ReplicaOpened", 1): _replica_opened_1,
    ("Snapshot", 1): _snapshot_1,
    ("Snapshot", 2): _snapshot_2,
    ("Snapshot", 3): _snapshot_3,
    ("Snapshot", 4): _snapshot_4,
    ("Snapshot", 5): _snapshot_5,
    ("Snapshot", 6): _snapshot_6,
    ("Snapshot", 7): _snapshot_7,
    ("Snapshot", 8): _snapshot_8,
}
