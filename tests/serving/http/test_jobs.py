"""`/v1/fine_tuning/jobs`: what may be asked, what a submission writes, and what each tenant sees."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from polygraft.cluster.advance import advance_job
from polygraft.cluster.backbones import put_backbone
from polygraft.cluster.events import JobAdmitted, JobCancelled, JobStarted, JobSubmitted
from polygraft.cluster.model import START, JobId, PackId
from polygraft.cluster.states import JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Write
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from tests.serving.http.conftest import EXAMPLE, Service, jsonl, refusal, upload

pytestmark = pytest.mark.anyio
PEFTS = {"target_modules": ["q_proj"]}
PEFT = "method.supervised.hyperparameters.peft"
MAX_LENGTH = "method.supervised.hyperparameters.max_length"


def body(file: str, /, **changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "training_file": file, **changes}


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


async def test_a_job_is_written_with_its_event_and_shown_in_openais_shape(
    service: Service, ann: httpx.AsyncClient
) -> None:
    file, held_out = await upload(ann), await upload(ann)
    method = supervised(peft="lora(r=4, at=attn.*)", n_epochs=2, batch_size=3, learning_rate=0.01, schedule="cosine")
    asked = body(file, validation_file=held_out, suffix="poems", seed=7, method=method, metadata={"a": "b"})
    made = (await ann.post("/fine_tuning/jobs", json=asked)).json()
    assert made["object"] == "fine_tuning.job" and made["status"] == "queued" and made["created_at"] == 1000
    assert (made["model"], made["training_file"], made["validation_file"]) == ("tiny", file, held_out)
    assert (made["seed"], made["suffix"], made["metadata"]) == (7, "poems", {"a": "b"})
    hyper = made["method"]["supervised"]["hyperparameters"]
    assert (hyper["peft"], hyper["learning_rate"], hyper["schedule"]) == ("lora(r=4, at=attn.*)", 0.01, "cosine")
    assert made["hyperparameters"] == {"n_epochs": 2, "batch_size": 3, "learning_rate_multiplier": 1.0}
    assert made["parameters"] == BoundGraft(parse("lora(r=4, at=attn.*)"), service.backbone.shape).parameters
    assert made["fine_tuned_model"] is made["error"] is made["finished_at"] is made["graft"] is None

    record = service.api.store.get(keys.job(JobId(made["id"])))
    assert record is not None and record.value.state is JobState.QUEUED and record.value.tenant == "ann"
    (stored,) = service.api.store.events(START)
    assert stored.event == JobSubmitted(record=record.value, at=1000.0)
    assert (await ann.get(f"/fine_tuning/jobs/{made['id']}")).json() == made


@pytest.mark.parametrize(
    ("peft", "rate"),
    [("lora", 3e-4), ("ia3", 5e-3), ("prefix(10) + parallel(64)@0 + lora(r=4)", 3e-4), ("p-tuning-v2(3)", 5e-3)],
)
async def test_the_learning_rate_defaults_to_the_methods_smallest(
    ann: httpx.AsyncClient, peft: str, rate: float
) -> None:
    file = await upload(ann)
    made = (await ann.post("/fine_tuning/jobs", json=body(file, method=supervised(peft=peft)))).json()
    assert made["method"]["supervised"]["hyperparameters"]["learning_rate"] == rate


async def test_a_job_says_how_urgent_it_is_on_how_many_devices_it_trains_and_that_it_waits(
    ann: httpx.AsyncClient,
) -> None:
    made = (await ann.post("/fine_tuning/jobs", json=body(await upload(ann), priority=3, devices=2))).json()
    assert (made["priority"], made["devices"], made["reason"]) == (3, 2, "waits_its_turn")


async def test_openais_multiplier_scales_the_default_rate(ann: httpx.AsyncClient) -> None:
    asked = body(await upload(ann), hyperparameters={"learning_rate_multiplier": 2.0, "n_epochs": 1})
    made = (await ann.post("/fine_tuning/jobs", json=asked)).json()
    assert made["method"]["supervised"]["hyperparameters"]["learning_rate"] == 6e-4


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {},
        {"peft": "lora(r=4, at=attn.*)", "learning_rate": 0.01, "dropout": 0.1, "max_length": 64, "schedule": "cosine"},
        {"peft": "ia3", "learning_rate_multiplier": 2.0, "n_epochs": 2, "warmup_ratio": 0.1, "weight_decay": 0.1},
        {"peft": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}},
    ],
)
async def test_the_method_of_an_answer_can_be_sent_again_and_means_the_same(
    service: Service, ann: httpx.AsyncClient, hyperparameters: dict[str, Any]
) -> None:
    file = await upload(ann)
    made = (await ann.post("/fine_tuning/jobs", json=body(file, method=supervised(**hyperparameters)))).json()
    answered = (await ann.get(f"/fine_tuning/jobs/{made['id']}")).json()["method"]
    again = await ann.post("/fine_tuning/jobs", json=body(file, method=answered))
    assert again.status_code == 200, again.text
    assert again.json()["method"] == answered
    first, second = (service.api.store.get(keys.job(JobId(one["id"]))) for one in (made, again.json()))
    assert first is not None and second is not None and first.value.spec == second.value.spec


async def test_a_rate_that_its_multiplier_contradicts_is_refused(ann: httpx.AsyncClient) -> None:
    hyperparameters = {"learning_rate": 6e-4, "learning_rate_multiplier": 2.0}
    refused = await ann.post("/fine_tuning/jobs", json=body(await upload(ann), method=supervised(**hyperparameters)))
    assert refused.status_code == 400
    said = refused.json()["error"]["message"]
    assert "learning_rate (0.0006) and learning_rate_multiplier (2) are both given; give one" in said


async def test_a_peft_config_is_read_as_such(ann: httpx.AsyncClient) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    made = (await ann.post("/fine_tuning/jobs", json=body(await upload(ann), method=supervised(peft=config)))).json()
    assert made["method"]["supervised"]["hyperparameters"]["peft"] == config
    beside = {**config, "rank_pattern": {"v_proj": 2}, "modules_to_save": ["norm"], "bias": "lora_only"}
    answer = await ann.post("/fine_tuning/jobs", json=body(await upload(ann), method=supervised(peft=beside)))
    assert answer.status_code == 200


async def test_qlora_is_for_a_quantised_backbone(service: Service, ann: httpx.AsyncClient) -> None:
    asked = body(await upload(ann), method=supervised(peft="qlora(r=2)"))
    refused = await ann.post("/fine_tuning/jobs", json=asked)
    assert refused.status_code == 400 and "polygraft up --quantise nf4" in refused.json()["error"]["message"]
    put_backbone(service.api.store, replace(service.backbone.record, quantise="nf4"), at=1.0)
    service.api.backbones.look()
    assert (await ann.post("/fine_tuning/jobs", json=asked)).status_code == 200


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"method": supervised(peft="lorra(r=4)")}, PEFT, "choices: adalora, adamss"),
        ({"method": supervised(peft="lora(at=attn.x)")}, PEFT, "sites: attn.q"),
        ({"method": supervised(peft="lora(r=0)")}, PEFT, "rank: 0"),
        ({"method": supervised(peft="lora@7")}, PEFT, "7 is not a layer"),
        ({"method": supervised(peft={"peft_type": "XLORA"})}, PEFT, "XLORA"),
        ({"method": supervised(peft={**PEFTS, "modules_to_save": ["lm_head"]})}, PEFT, "modules_to_save: 'lm_head'"),
        ({"method": supervised(peft={"bias": "some"})}, PEFT, "bias: 'some'"),
        ({"method": supervised(peft={"trainable_token_indices": [3]})}, PEFT, "trainable_token_indices: PEFT edits"),
        ({"method": supervised(peft={**PEFTS, "rank_pattern": {"q_proj": "x"}})}, PEFT, "rank_pattern: 'x'"),
        ({"method": supervised(peft={"rank_pattern": {"q_proj": 2}})}, PEFT, "target_modules: is not given"),
        ({"method": supervised(peft="s4")}, PEFT, "polygraft methods --s4"),
        ({"method": supervised(peft="lorahub(of=a)")}, PEFT, "polygraft grafts soup"),
        ({"method": supervised(peft="mole(of=a)")}, PEFT, "called 'output-gated-loras'"),
        ({"method": supervised(peft="spt(length=3)")}, PEFT, "and not selective prompt tuning"),
        ({"method": supervised(peft="lora(r=10000)")}, PEFT, "bytes in training, a pack has 67,108,864"),
        ({"method": supervised(peft="serial(100000)")}, PEFT, "'serial(100000)' needs"),
        ({"method": supervised(peft="bitdelta")}, PEFT, "make a graft of one with `polygraft grafts bitdelta FOLDER"),
        ({"method": supervised(max_length=513)}, MAX_LENGTH, "513 tokens are more than the backbone's 512 positions"),
        ({"method": supervised(peft="prefix(300)", max_length=256)}, MAX_LENGTH, "256 tokens and the 300 "),
        ({"method": supervised(peft="prefix(511)")}, MAX_LENGTH, "2 tokens and the 511 "),
        ({"method": supervised(peft='{"a":' + "[" * 1900)}, PEFT, "not JSON"),
        ({"method": supervised(peft={"r": 10**400})}, f"{PEFT}.r", "peft.r: is a number past"),
        ({"method": supervised(peft=f"lora(r={'9' * 1500})")}, PEFT, "lora.r"),
        ({"method": supervised(n_epochs=0)}, "method.supervised.hyperparameters.n_epochs", "0"),
        ({"method": supervised(learning_rate="fast")}, "method.supervised.hyperparameters.learning_rate", "fast"),
        ({"method": supervised(colour="red")}, "method.supervised.hyperparameters.colour", "peft"),
        ({"method": {"type": "dpo"}}, "method", "dpo"),
        ({"suffix": "../up"}, "suffix", "../up"),
        ({"seed": -1}, "seed", "-1"),
        ({"speed": 1}, "speed", "unknown field"),
        ({"model": None}, "model", "None"),
    ],
)
async def test_bad_fields_are_400_and_named_with_their_choices(
    service: Service, ann: httpx.AsyncClient, changes: dict[str, Any], param: str, said: str
) -> None:
    error = refusal(await ann.post("/fine_tuning/jobs", json=body(await upload(ann), **changes)), 400)
    assert error["param"] == param and said in error["message"]
    assert service.api.store.events(START) == []


async def test_a_job_over_other_grafts_keeps_the_versions_that_their_names_meant(
    service: Service, ann: httpx.AsyncClient
) -> None:
    service.publish("ann", "lora(r=2)", "a", 3)
    service.publish("ann", "lora(r=4)", "b", 1)
    file = await upload(ann)
    asked = body(file, method=supervised(peft="meteora(r=4, of=a|b@1) + prefix(3)"))
    made = (await ann.post("/fine_tuning/jobs", json=asked)).json()
    assert made["method"]["supervised"]["hyperparameters"]["peft"] == "meteora(r=4, of=a@3|b@1) + prefix(length=3)"
    record = service.api.store.get(keys.job(JobId(made["id"])))
    meteora = BoundGraft(parse("meteora(r=4, of=a|b)"), service.backbone.shape)
    assert record is not None and record.value.frozen == meteora.frozen > 0
    service.publish("ann", "lora(r=2)", "far", backbone="another")
    service.publish("bob", "lora(r=2)", "bobs")
    wrong = (("bobs", 404, "bobs"), ("a@4", 404, "a@4"), ("tiny", 404, "tiny"), ("far", 400, "another"))
    for of, status, said in wrong:
        answer = await ann.post("/fine_tuning/jobs", json=body(file, method=supervised(peft=f"meteora(of={of})")))
        error = refusal(answer, status)
        assert error["param"] == PEFT and said in error["message"]
    answer = await ann.post("/fine_tuning/jobs", json=body(file, method=supervised(peft="meteora(r=2, of=a|b)")))
    assert "'b' has rank 4 at 0.attn.q, more than 2" in refusal(answer, 400)["message"]


async def test_names_whose_versions_make_no_job_are_400(service: Service, ann: httpx.AsyncClient) -> None:
    service.publish("ann", "lora(r=2)", "a", 3)
    names = [f"{index:063}" for index in range(30)]
    for name in names:
        service.publish("ann", "lora(r=2)", name, 100)
    file = await upload(ann)
    for of, said in (("|".join(names), "at most 2000"), ("a|a@3", "'a@3' is named 2 times")):
        answer = await ann.post("/fine_tuning/jobs", json=body(file, method=supervised(peft=f"meteora(r=2, of={of})")))
        error = refusal(answer, 400)
        assert error["param"] == PEFT and said in error["message"]


async def test_a_job_over_a_graft_whose_files_are_gone_or_damaged_is_400(
    service: Service, ann: httpx.AsyncClient
) -> None:
    description = service.api.folders.grafts / service.publish("ann", "lora(r=2)", "a").id / "graft.json"
    asked = body(await upload(ann), method=supervised(peft="meteora(of=a)"))
    description.write_text('{"spec": {"slots": []}}')
    answers = [await ann.post("/fine_tuning/jobs", json=asked)]
    description.unlink()
    answers.append(await ann.post("/fine_tuning/jobs", json=asked))
    for error in (refusal(answer, 400) for answer in answers):
        assert error["param"] == PEFT and "the files of 'a' are missing or damaged" in error["message"]


async def test_unknown_models_and_files_are_404(ann: httpx.AsyncClient, bob: httpx.AsyncClient) -> None:
    file, bobs = await upload(ann), await upload(bob)
    assert refusal(await ann.post("/fine_tuning/jobs", json=body(file, model="gpt")), 404)["param"] == "model"
    for missing in ("file-0", bobs):
        assert refusal(await ann.post("/fine_tuning/jobs", json=body(missing)), 404)["param"] == "training_file"
        answer = await ann.post("/fine_tuning/jobs", json=body(file, validation_file=missing))
        assert refusal(answer, 404)["param"] == "validation_file"


async def test_truncation_that_leaves_nothing_to_learn_names_the_line(ann: httpx.AsyncClient) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "yes"}]}
    file = await upload(ann, jsonl(EXAMPLE, long))
    error = refusal(await ann.post("/fine_tuning/jobs", json=body(file, method=supervised(max_length=50))), 400)
    assert error["param"] == "training_file" and "line 2" in error["message"] and "max_length" in error["message"]
    assert (await ann.post("/fine_tuning/jobs", json=body(file, method=supervised(max_length=400)))).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"model": NaN}', b"\xff", b"[" * 100_000])
async def test_a_body_that_is_not_an_object_is_400(ann: httpx.AsyncClient, content: bytes) -> None:
    refusal(await ann.post("/fine_tuning/jobs", content=content), 400)


@pytest.mark.parametrize(("pair", "param"), [(r'"a": "\ud800"', "metadata.a"), (r'"\udc00": "a"', "metadata")])
async def test_half_of_a_surrogate_pair_is_400_and_nothing_is_written(
    service: Service, ann: httpx.AsyncClient, pair: str, param: str
) -> None:
    asked = json.dumps(body(await upload(ann), metadata={})).replace("{}", f"{{{pair}}}")
    error = refusal(await ann.post("/fine_tuning/jobs", content=asked), 400)
    assert error["param"] == param and "half of a surrogate pair" in error["message"]
    assert service.api.store.events(START) == []


async def test_a_body_of_megabytes_is_413(ann: httpx.AsyncClient) -> None:
    refusal(await ann.post("/fine_tuning/jobs", content=b'"' + b"x" * (5 << 20) + b'"'), 413)


async def test_the_same_idempotency_key_gives_the_first_job_again(
    service: Service, ann: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    asked = body(await upload(ann))
    key = {"Idempotency-Key": "once"}
    first = (await ann.post("/fine_tuning/jobs", json=asked, headers=key)).json()
    again = await ann.post("/fine_tuning/jobs", json=dict(reversed(asked.items())), headers=key)
    assert again.json() == first
    error = refusal(await ann.post("/fine_tuning/jobs", json={**asked, "seed": 1}, headers=key), 409)
    assert "'once' was used" in error["message"] and error["param"] == "Idempotency-Key"
    bobs = (await bob.post("/fine_tuning/jobs", json=body(await upload(bob)), headers=key)).json()
    assert bobs["id"] != first["id"]
    assert len(service.api.store.events(START)) == 2


async def test_a_retry_gives_the_first_job_whatever_has_changed_since(service: Service, ann: httpx.AsyncClient) -> None:
    """The limit of unfinished jobs is reached, the first job is cancelled, and its file is gone."""
    file, url, key = await upload(ann), "/fine_tuning/jobs", {"Idempotency-Key": "once"}
    first = (await ann.post(url, json=body(file), headers=key)).json()
    others = [(await ann.post(url, json=body(file))).json()["id"] for _ in range(3)]
    assert refusal(await ann.post(url, json=body(file)), 429)["code"] == "too_many_jobs"
    assert (await ann.post(url, json=body(file), headers=key)).json() == first
    refusal(await ann.post(url, json=body(file, seed=1), headers=key), 409)
    for id in (first["id"], *others):
        advance_job(service.api.store, JobCancelled(job=id, at=1001.0))
    assert (await ann.delete(f"/files/{file}")).status_code == 200
    again = (await ann.post(url, json=body(file), headers=key)).json()
    assert (again["id"], again["status"]) == (first["id"], "cancelled")


async def test_lists_show_a_tenants_own_jobs_newest_first(
    service: Service, ann: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    file = await upload(ann)
    ids = []
    for _ in range(3):
        ids.append((await ann.post("/fine_tuning/jobs", json=body(file))).json()["id"])
        service.now[0] += 1
    page = (await ann.get("/fine_tuning/jobs?limit=2")).json()
    assert [job["id"] for job in page["data"]] == ids[:0:-1] and page["has_more"]
    rest = (await ann.get(f"/fine_tuning/jobs?after={page['data'][-1]['id']}")).json()
    assert [job["id"] for job in rest["data"]] == ids[:1] and not rest["has_more"]
    assert (await bob.get("/fine_tuning/jobs")).json()["data"] == []


async def test_another_tenants_job_does_not_exist(ann: httpx.AsyncClient, bob: httpx.AsyncClient) -> None:
    id = (await ann.post("/fine_tuning/jobs", json=body(await upload(ann)))).json()["id"]
    url = f"/fine_tuning/jobs/{id}"
    answers = [await bob.get(url), await bob.post(f"{url}/cancel"), await bob.get(f"{url}/events")]
    answers.append(await bob.post(f"{url}/renew", json={"lease_s": 5}))
    for answer in answers:
        assert refusal(answer, 404)["message"] == f"job '{id}' does not exist"
    assert (await ann.get(url)).json()["status"] == "queued"


async def test_unfinished_jobs_are_limited(ann: httpx.AsyncClient) -> None:
    file = await upload(ann)
    for _ in range(4):
        assert (await ann.post("/fine_tuning/jobs", json=body(file))).status_code == 200
    assert refusal(await ann.post("/fine_tuning/jobs", json=body(file)), 429)["code"] == "too_many_jobs"


async def test_a_cancel_is_recorded_once_and_a_finished_job_cannot_be_cancelled(
    service: Service, ann: httpx.AsyncClient
) -> None:
    id = (await ann.post("/fine_tuning/jobs", json=body(await upload(ann)))).json()["id"]
    for _ in range(2):
        assert (await ann.post(f"/fine_tuning/jobs/{id}/cancel")).status_code == 200
    kinds = [type(stored.event).__name__ for stored in service.api.store.events(START)]
    assert kinds == ["JobSubmitted", "JobCancelRequested"]
    advance_job(service.api.store, JobCancelled(job=JobId(id), at=1001.0))
    made = (await ann.post(f"/fine_tuning/jobs/{id}/cancel")).json()
    assert made["status"] == "cancelled" and made["finished_at"] == 1001


async def test_a_job_that_ended_by_itself_cannot_be_cancelled(service: Service, ann: httpx.AsyncClient) -> None:
    id = JobId((await ann.post("/fine_tuning/jobs", json=body(await upload(ann)))).json()["id"])
    advance_job(service.api.store, JobCancelled(job=id, at=1001.0))
    assert "cancelled already" in refusal(await ann.post(f"/fine_tuning/jobs/{id}/cancel"), 400)["message"]


async def test_an_owner_renews_its_lease(service: Service, ann: httpx.AsyncClient) -> None:
    file = await upload(ann)
    owned = (await ann.post("/fine_tuning/jobs", json=body(file, owner={"name": "study-1", "lease_s": 30}))).json()
    assert (owned["owner"], owned["lease_until"]) == ("study-1", 1030)
    service.now[0] = 1020.0
    renewed = (await ann.post(f"/fine_tuning/jobs/{owned['id']}/renew", json={"lease_s": 60})).json()
    assert renewed["lease_until"] == 1080
    url = f"/fine_tuning/jobs/{owned['id']}/renew"
    assert refusal(await ann.post(url, json={"lease_s": 0}), 400)["param"] == "lease_s"
    assert refusal(await ann.post(url, json={}), 400)["param"] == "lease_s"
    advance_job(service.api.store, JobCancelled(job=JobId(owned["id"]), at=1021.0))
    assert (await ann.post(url, json={"lease_s": 60})).json()["status"] == "cancelled"
    free = (await ann.post("/fine_tuning/jobs", json=body(file))).json()["id"]
    assert refusal(await ann.post(f"/fine_tuning/jobs/{free}/renew", json={"lease_s": 5}), 400)["code"] == "no_owner"


async def test_events_join_log_and_metrics_newest_first(service: Service, ann: httpx.AsyncClient) -> None:
    id = JobId((await ann.post("/fine_tuning/jobs", json=body(await upload(ann)))).json()["id"])
    store = service.api.store
    store.append(keys.log(id), {"level": "info", "message": "started", "at": 1001.5, "data": {"pack": "pack-1"}})
    for step in range(3):
        store.append(keys.metrics(id), {"step": step, "loss": 2.5 - step, "lr": 0.1, "tokens": 8, "at": 1002.0 + step})
    store.append(keys.log(id), {"level": "error", "message": "lost", "at": 1009.0, "data": None})
    page = (await ann.get(f"/fine_tuning/jobs/{id}/events?limit=3")).json()
    assert page["has_more"] and [event["type"] for event in page["data"]][:1] == ["message"]
    rest = (await ann.get(f"/fine_tuning/jobs/{id}/events?after={page['last_id']}")).json()
    events = page["data"] + rest["data"]
    assert [event["message"] for event in events] == [
        "lost",
        "step 2: loss 0.5000",
        "step 1: loss 1.5000",
        "step 0: loss 2.5000",
        "started",
    ]
    assert events[1]["data"] == {"step": 2, "loss": 0.5, "lr": 0.1, "tokens": 8} and events[1]["created_at"] == 1004
    assert events[0]["level"] == "error" and events[4]["data"] == {"pack": "pack-1"}
    assert len({event["id"] for event in events}) == 5


async def test_progress_is_shown_while_a_job_runs(service: Service, ann: httpx.AsyncClient) -> None:
    id = JobId((await ann.post("/fine_tuning/jobs", json=body(await upload(ann)))).json()["id"])
    pack = PackId("pack-1")
    advance_job(service.api.store, JobAdmitted(job=id, pack=pack, at=1001.0))
    advance_job(service.api.store, JobStarted(job=id, pack=pack, parameters=10, steps_total=5, at=1002.0))
    seen = (await ann.get(f"/fine_tuning/jobs/{id}")).json()
    assert (seen["status"], seen["pack"], seen["steps_total"], seen["started_at"]) == ("running", "pack-1", 5, 1002)
    assert json.dumps(seen)


async def test_a_job_goes_on_from_one_that_ended_at_an_earlier_rung(
    service: Service, ann: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    file = await upload(ann)
    first = (await ann.post("/fine_tuning/jobs", json=body(file, rung={"until": 0.5}))).json()
    assert first["rung"] == {"until": 0.5, "after": None}
    on = {"after": first["id"]}
    early = refusal(await ann.post("/fine_tuning/jobs", json=body(file, rung=on)), 400)
    assert early["param"] == "rung.after" and "is queued" in early["message"]
    found = service.api.store.get(keys.job(JobId(first["id"])))
    assert found is not None
    service.api.store.commit([Write(found.key, replace(found.value, state=JobState.SUCCEEDED), found.version)])
    explored = body(file, rung=on, method=supervised(learning_rate=1e-2))
    assert (await ann.post("/fine_tuning/jobs", json=explored)).json()["rung"] == {"until": 1.0, **on}
    for changed, param in (
        (body(file, rung={**on, "until": 0.5}), "rung.after"),
        (body(file, rung=on, seed=3), "seed"),
        (body(file, rung=on, method=supervised(peft="lora(r=2)")), "peft"),
        (body(await upload(ann), rung=on), "training_file"),
    ):
        assert refusal(await ann.post("/fine_tuning/jobs", json=changed), 400)["param"] == param
    theirs = body(await upload(bob), rung=on)
    assert (await bob.post("/fine_tuning/jobs", json=theirs)).status_code == 404
