"""The body of a fine-tuning job: OpenAI's fields and ours, and what is said about bad ones."""

from __future__ import annotations

import inspect
import json
from typing import Any

import openai.types.fine_tuning.job_create_params as theirs
import pytest

from polygraft.cluster.model import FileId, JobSpec
from polygraft.cluster.spec import BadRequest, FineTuningRequest, Hyperparameters, read_request

HYPER = "method.supervised.hyperparameters"


def body(hyper: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    method = {} if hyper is None else {"method": {"type": "supervised", "supervised": {"hyperparameters": hyper}}}
    return {"model": "b", "training_file": "file-1", **method, **fields}


def test_the_smallest_body_gives_the_defaults() -> None:
    assert read_request(body()).to_spec() == JobSpec(backbone="b", training_file=FileId("file-1"))


def test_every_field_arrives() -> None:
    hyper = {
        "n_epochs": 2,
        "batch_size": 8,
        "peft": "dora(r=4)",
        "learning_rate": 0.001,
        "optimizer": "adamw",
        "schedule": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 2.0,
        "max_length": 128,
        "dropout": 0.05,
    }
    request = read_request(
        body(
            hyper,
            validation_file="file-2",
            suffix="tutor",
            seed=7,
            metadata={"k": "v"},
            promote=True,
            priority=-3,
            devices=2,
            integrations=None,
        )
    )
    assert request.to_spec() == JobSpec(
        backbone="b",
        training_file=FileId("file-1"),
        validation_file=FileId("file-2"),
        suffix="tutor",
        peft="dora(r=4)",
        epochs=2,
        batch_size=8,
        learning_rate=0.001,
        schedule="cosine",
        warmup_ratio=0.1,
        weight_decay=0.01,
        max_grad_norm=2.0,
        max_length=128,
        dropout=0.05,
        seed=7,
        metadata=(("k", "v"),),
        promote=True,
        priority=-3,
        devices=2,
    )


def test_auto_means_the_default_and_a_multiplier_is_kept_for_the_methods_rate() -> None:
    auto = read_request(body({"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": 2})).to_spec()
    assert (auto.epochs, auto.batch_size, auto.learning_rate, auto.learning_rate_multiplier) == (3, 4, None, 2.0)


def test_the_deprecated_hyperparameters_still_work() -> None:
    old = read_request(
        body(hyperparameters={"n_epochs": 1, "batch_size": 2, "learning_rate_multiplier": 0.5})
    ).to_spec()
    assert (old.epochs, old.batch_size, old.learning_rate_multiplier) == (1, 2, 0.5)


def test_a_peft_config_travels_as_text() -> None:
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    peft = read_request(body({"peft": config})).to_spec().peft
    assert json.loads(peft) == config


def test_an_owner_has_a_lease() -> None:
    request = read_request(body(owner={"name": "study-1/3", "lease_s": 30}))
    assert request.owner is not None and (request.owner.name, request.owner.lease_s) == ("study-1/3", 30)


def test_all_of_openais_fields_are_ours_too() -> None:
    assert set(theirs.JobCreateParams.__annotations__) <= set(FineTuningRequest.model_fields)
    supervised = inspect.get_annotations(theirs.Hyperparameters)
    assert set(supervised) <= set(Hyperparameters.model_fields)


@pytest.mark.parametrize(
    ("bad", "param", "message"),
    [
        (
            body(colour="red"),
            "colour",
            "unknown field (got 'red'); choices: devices, hyperparameters, integrations",
        ),
        (body({"lr": 1}), f"{HYPER}.lr", "unknown field (got 1); choices: batch_size, dropout, learning_rate,"),
        (body({"a-b": 1}), f"{HYPER}.a-b", "unknown field (got 1); choices: batch_size, dropout"),
        (body(**{"int": 1}), "int", "int: unknown field (got 1); choices: devices, hyperparameters, integrations"),  # type: ignore[arg-type]
        (body({"peft": "lora(r=0)"}), f"{HYPER}.peft", "rank: 0"),
        (body({"peft": "magic"}), f"{HYPER}.peft", "unknown method 'magic'; choices: adalora, adamss"),
        (body({"peft": {"peft_type": "X"}}), f"{HYPER}.peft", "peft_type: 'X'"),
        (body({"peft": 3}), f"{HYPER}.peft", "valid string; or: Input should be a valid dictionary (got 3)"),
        (body({"n_epochs": 0}), f"{HYPER}.n_epochs", "greater than or equal to 1 (got 0)"),
        (body({"n_epochs": True}), f"{HYPER}.n_epochs", "(got True)"),
        (body({"n_epochs": "3"}), f"{HYPER}.n_epochs", "'auto'; or: Input should be a valid integer (got '3')"),
        (body({"learning_rate": float("nan")}), f"{HYPER}.learning_rate", "(got nan)"),
        (body({"dropout": 1.0}), f"{HYPER}.dropout", "less than 1"),
        (body({"schedule": "step"}), f"{HYPER}.schedule", "'linear', 'constant' or 'cosine' (got 'step')"),
        (body({"learning_rate": 0.1, "learning_rate_multiplier": 2}), HYPER, "both given; give one"),
        (body(method={"type": "dpo", "dpo": {}}), "method", "type 'dpo' is not supported; use 'supervised'"),
        (body(method={"type": "reinforcement"}), "method", "type 'reinforcement' is not supported"),
        (body({}, hyperparameters={}), "hyperparameters", "given with method, too"),
        (body(suffix="My Model"), "suffix", "(got 'My Model')"),
        (body(suffix="a" * 41), "suffix", "match pattern"),
        (body(suffix="b"), "suffix", "'b' is the name of the base model"),
        (body(seed=-1), "seed", "(got -1)"),
        (body(priority=11), "priority", "(got 11)"),
        (body(devices=0), "devices", "(got 0)"),
        (body(metadata={str(n): "x" for n in range(17)}), "metadata", "17 pairs; at most 16"),
        (body(metadata={"k": "x" * 513}), "metadata", "'k': keys have at most 64 characters, values 512"),
        (body(integrations=[{"type": "wandb"}]), "integrations", "Input should be None"),
        (body(owner={"name": "x"}), "owner.lease_s", "required, but missing"),
        (body(owner={"name": "x", "lease_s": 5, "z": 1}), "owner.z", "choices: lease_s, name"),
        ({"model": "b"}, "training_file", "training_file: required, but missing"),
        ([], None, "body: Input should be a valid dictionary"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_the_choices(bad: object, param: str | None, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_request(bad)
    assert caught.value.param == param and message in str(caught.value)


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(BadRequest) as caught:
        read_request(body(suffix="x" * 10_000))
    assert len(str(caught.value)) < 300
