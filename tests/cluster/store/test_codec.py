"""Records and events as text: nothing is lost, nothing unknown is let in."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any, get_args

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.cluster.events import (
    DeviceJoined,
    Event,
    GraftPublished,
    JobStarted,
    JobSubmitted,
    PackOpening,
    ReplicaOpened,
)
from polygraft.cluster.model import Graft, GraftId, JobError, JobId, PackId, Record, Snapshot, TenantId
from polygraft.cluster.states import Reason
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import JSON, Key
from polygraft.cluster.store.codec import (
    CodecError,
    decode_entry,
    decode_event,
    decode_record,
    encode_entry,
    encode_event,
    encode_record,
)
from tests.cluster.builders import make_backbone, make_device, make_job, make_pack, make_replica, make_snapshot, running

JOB = make_job("a")
JOB_KEY = keys.job(JOB.id)


st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))


def plain(kind: type, **given: st.SearchStrategy[object]) -> st.SearchStrategy[Any]:
    """Values of any record or event, mappings empty."""
    empty: dict[str, st.SearchStrategy[Any]] = {
        field.name: st.just(MappingProxyType({})) for field in fields(kind) if "Mapping" in field.type
    }
    return st.builds(kind, **empty, **given)


@settings(max_examples=60)
@given(st.one_of(*(st.deferred(lambda kind=kind: plain(kind)) for kind in get_args(Event))))  # type: ignore[misc]
def test_every_event_comes_back_as_it_was(event: Event) -> None:
    assert decode_event(encode_event(event)) == event


@settings(max_examples=60)
@given(st.one_of(*(st.deferred(lambda kind=kind: plain(kind)) for kind in get_args(Record))))  # type: ignore[misc]
def test_every_record_comes_back_as_it_was(record: Record) -> None:
    key: Key[Record] = Key(f"{next(name for name, kind in keys.TYPES.items() if kind is type(record))}/x")
    assert decode_record(key, encode_record(key, record)) == record


def test_a_snapshot_keeps_its_jobs_by_id() -> None:
    one = make_backbone("b", quantise="nf4", context_length=8192, loaded=True)
    snapshot = make_snapshot(jobs=(JOB, running("b")), packs=(make_pack(),), backbones=(one,), devices=2)
    found = decode_record(keys.SNAPSHOT, encode_record(keys.SNAPSHOT, snapshot))
    assert isinstance(found, Snapshot) and found == snapshot and list(found.jobs) == ["ftjob-a", "ftjob-b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Task"}, "job/ftjob-a: unknown type 'Task'; another version"),
        ({"schema": 7}, "job/ftjob-a: Job of schema 7, not 6"),
        ({"colour": "red"}, "Job: expected the fields id, tenant.*found.*colour"),
        ({"state": "asleep"}, "Job.state: 'asleep' is not one of queued, running"),
        ({"step": 1.5}, "Job.step: expected int, found 1.5"),
        ({"step": True}, "Job.step: expected int, found True"),
        ({"tenant": None}, "Job.tenant: expected str, found None"),
        ({"error": {"code": "x"}}, "Job.error: expected the fields code, message, param"),
    ],
)
def test_text_that_is_no_job_of_this_version_names_the_field(change: dict[str, object], message: str) -> None:
    text = json.dumps({**json.loads(encode_record(JOB_KEY, JOB)), **change})
    with pytest.raises(CodecError, match=message):
        decode_record(JOB_KEY, text)


OLD_GRAFT = (
    '{"type":"Graft","schema":1,"tenant":"ann","name":"tutor","version":3,"id":"g","method":%s,'
    '"backbone_fingerprint":"f","parameters":5,"bytes":20,"created_at":7.0,"job":null}'
)


@pytest.mark.parametrize(
    ("method", "length"), [("lora(r=4)", 0), ("prefix(4) + prompt(3)", 7), ("somebody's prefix", 0)]
)
def test_a_graft_written_before_its_context_length_was_kept_is_read_with_it(method: str, length: int) -> None:
    text = OLD_GRAFT % json.dumps(method)
    found = decode_record(keys.graft(TenantId("ann"), "tutor", 3), text)
    expected = Graft(
        tenant=TenantId("ann"),
        name="tutor",
        version=3,
        id=GraftId("g"),
        method=method,
        backbone_fingerprint="f",
        parameters=5,
        bytes=20,
        context_length=length,
        created_at=7.0,
    )
    assert found == expected
    fields = {name: value for name, value in json.loads(text).items() if name not in ("type", "schema")}
    event = json.dumps({"type": "GraftPublished", "schema": 1, "graft": fields, "at": 7.0})
    assert decode_event(event) == GraftPublished(graft=expected, at=7.0)


@pytest.mark.parametrize("schema", [0, 3, "1", None, [1]])
def test_a_graft_of_a_schema_that_nobody_knows_is_refused(schema: object) -> None:
    text = json.dumps({**json.loads(OLD_GRAFT % '"lora"'), "schema": schema})
    with pytest.raises(CodecError, match=r"Graft of schema .*, not 2; another version"):
        decode_record(keys.graft(TenantId("ann"), "tutor", 3), text)


def test_a_job_written_before_its_class_of_device_was_kept_is_read_without_one() -> None:
    def older(text: str) -> str:
        return re.sub('"schema":[2-9]', '"schema":1', text).replace(',"device_class":null', "")

    assert decode_record(JOB_KEY, older(encode_record(JOB_KEY, JOB))) == JOB
    snapshot = make_snapshot(jobs=(JOB,), backbones=(), devices=0)
    assert decode_record(keys.SNAPSHOT, older(encode_record(keys.SNAPSHOT, snapshot))) == snapshot
    started = JobStarted(job=JobId("a"), pack=PackId("p"), parameters=1, steps_total=1, at=1.0)
    for event in (JobSubmitted(record=JOB, at=1.0), started):
        assert '"device_class"' in encode_event(event) and '"device_class"' not in older(encode_event(event))
        assert decode_event(older(encode_event(event))) == event


def test_a_job_written_before_there_were_rungs_is_read_as_one_that_trains_to_its_end() -> None:
    def older(text: str) -> str:
        return text.replace('"schema":6', '"schema":5').replace('"schema":9', '"schema":7').replace(',"rung":null', "")

    snapshot = make_snapshot(jobs=(JOB,), backbones=(), devices=0)
    assert '"rung"' not in older(encode_record(JOB_KEY, JOB))
    assert decode_record(JOB_KEY, older(encode_record(JOB_KEY, JOB))) == JOB
    assert decode_record(keys.SNAPSHOT, older(encode_record(keys.SNAPSHOT, snapshot))) == snapshot
    submitted = JobSubmitted(record=JOB, at=1.0)
    assert decode_event(older(encode_event(submitted))) == submitted


def test_a_store_of_the_time_when_devices_had_shares_is_read() -> None:
    """What held a device held one of it and no bytes that anybody counted; the device itself is found anew."""
    held = '"backbone":"b","device":"d","epoch":1'
    pack = f'"id":"pack-p",{held},"opened_at":1.0,"state":"open","closed_at":null,"error":null}}'
    replica = '"id":"r","backbone":"b","device":"d","opened_at":1.0}'
    limits = '{"max_jobs":32,"pack_bytes":0,"max_rows":768,"row_bytes":0,"idle_s":60.0,"max_attempts":3}'
    text = (
        f'{{"type":"Snapshot","schema":2,"version":"16-2","now":10.0,"limits":{limits},"jobs":[],"packs":[{{{pack}],'
        f'"replicas":[{{{replica}],"devices":[{{"id":"d","pack_shares":1}}]}}'
    )
    gone = make_device(node="d", bytes_=0, cores=0, speed=0.0)
    old, replica_then = make_pack(bytes=0), make_replica(bytes=0)
    expected = make_snapshot(packs=(old,), replicas=(replica_then,))
    assert decode_record(keys.SNAPSHOT, text) == replace(expected, devices={gone.id: gone})
    assert decode_record(keys.pack(old.id), '{"type":"Pack","schema":1,' + pack) == old
    assert decode_record(keys.replica(replica_then.id), '{"type":"Replica","schema":1,' + replica) == replica_then
    opening = f'{{"type":"PackOpening","schema":1,"pack":"pack-p",{held},"reason":"jobs_wait","at":1.0}}'
    assert decode_event(opening) == PackOpening(
        pack=old.id, backbone="b", devices=old.devices, bytes=0, epoch=1, reason=Reason.JOBS_WAIT, at=1.0
    )
    opened = '{"type":"ReplicaOpened","schema":1,"replica":"r","backbone":"b","device":"d","at":1.0}'
    assert decode_event(opened) == ReplicaOpened(record=replica_then, at=1.0)
    joined = '{"type":"DeviceJoined","schema":1,"device":"d","pack_shares":1,"at":1.0}'
    assert decode_event(joined) == DeviceJoined(record=gone, at=1.0)


def test_a_value_of_a_subclass_is_written_plainly() -> None:
    job = make_job("a", loss_after=numpy.float64(0.5), error=JobError(Reason.TOO_LARGE, "m"))
    found = decode_record(JOB_KEY, encode_record(JOB_KEY, job))
    assert type(found.loss_after) is float and found.error is not None and type(found.error.code) is str
    assert found == job


def test_a_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(CodecError, match="Job: a number is not finite"):
        encode_record(JOB_KEY, make_job("a", loss_after=math.nan))


def test_numbers_of_an_entry_that_are_not_finite_become_null_at_any_depth() -> None:
    entry: dict[str, JSON] = {"a": math.inf, "b": {"c": math.nan, "d": [1.5, -math.inf, {"e": math.nan}]}, "f": 2}
    assert decode_entry(encode_entry(entry)) == {"a": None, "b": {"c": None, "d": [1.5, None, {"e": None}]}, "f": 2}


def test_a_missing_field_is_an_error_even_where_it_has_a_default() -> None:
    body = json.loads(encode_record(JOB_KEY, JOB))
    del body["step"]
    with pytest.raises(CodecError, match="expected the fields"):
        decode_record(JOB_KEY, json.dumps(body))


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_text_that_is_no_object_is_an_error(text: str) -> None:
    with pytest.raises(CodecError):
        decode_event(text)


def test_an_event_is_not_a_record() -> None:
    started = JobStarted(job=JobId("a"), pack=PackId("p"), parameters=1, steps_total=1, at=1.0)
    with pytest.raises(CodecError, match="expected a Job, found a JobStarted"):
        decode_record(JOB_KEY, encode_event(started))
    with pytest.raises(CodecError, match="expected an event, found a Job"):
        decode_event(encode_record(JOB_KEY, JOB))


def test_an_entry_cannot_be_changed_by_its_reader() -> None:
    entry = decode_entry(encode_entry({"n": 1}))
    with pytest.raises(TypeError):
        entry["n"] = 2  # type: ignore[index]
