"""How large packs and replicas are made on devices from a small CPU to a large GPU, for models from 135M to 70B."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygraft.cluster.policy.capacity import (
    BLOCK,
    DoesNotFit,
    ModelSize,
    Portion,
    longest_context,
    pack_capacity,
    serve_capacity,
    streams_at_once,
)
from polygraft.cluster.policy.devices import sized_bytes
from polygraft.cluster.policy.entry import ever_fits
from polygraft.cluster.settings import PackSettings, ServeSettings, Settings, load
from polygraft.cluster.sizing import fitted, sizes
from polygraft.grafts.sites import ModelShape
from tests.cluster.builders import make_backbone, make_device

GIB = 1 << 30
CONFIGS: Mapping[str, dict[str, object]] = {  # as the models' own config.json have them
    "135M": {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    },
    "8B": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "70B": {
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
}
HELD = {
    "8 GB CPU": Portion(kind="cpu", bytes=8 * GIB, speed=3e11),
    "24 GB": Portion(kind="cuda", bytes=24 * GIB, speed=1.5e14),
    "half of 24 GB": Portion(kind="cuda", bytes=12 * GIB, speed=1.5e14),
    "141 GB": Portion(kind="cuda", bytes=141 * GIB, speed=6e14),
}


def model(name: str) -> ModelSize:
    shape = ModelShape.from_config({"model_type": "llama", **CONFIGS[name]})
    return ModelSize(shape=shape, itemsize=2, quantised=name != "135M")


FITS = [(name, held) for name in CONFIGS for held in HELD if name != "70B" or held == "141 GB"]


@pytest.mark.parametrize(("name", "held"), FITS)
def test_nearly_all_of_what_is_held_is_given_out_and_never_more(name: str, held: str) -> None:
    if (name, held) == ("8B", "8 GB CPU"):
        assert model(name).weight_bytes() < 6 * GIB, "it holds the device whole"
    for capacity in (serve_capacity(model(name), HELD[held]), pack_capacity(model(name), HELD[held])):
        assert 0.85 <= capacity.given_out / HELD[held].bytes <= 1.0


@pytest.mark.parametrize(("name", "held"), FITS)
def test_a_replica_s_sizes_fit_each_other(name: str, held: str) -> None:
    own, size = serve_capacity(model(name), HELD[held]), model(name)
    blocks = own.kv_bytes // (size.token_bytes * BLOCK)
    assert ever_fits(own.max_context, blocks=blocks - 1, block_size=BLOCK), "an engine refuses to start else"
    assert own.max_context <= size.shape.positions and own.max_streams <= own.max_rows
    assert streams_at_once(own, size, own.max_context) >= 1


def test_the_weights_are_about_those_of_the_model_s_name() -> None:
    for name, billions in (("135M", 0.135), ("8B", 8.03), ("70B", 70.6)):
        size = model(name)
        count = size.projections + (1 if name == "135M" else 2) * size.shape.vocab * size.shape.hidden
        assert count / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("held", ["24 GB", "half of 24 GB", "141 GB"])
def test_four_streams_of_8k_tokens_run_on_8b_in_four_bits(held: str) -> None:
    own = serve_capacity(model("8B"), HELD[held])
    assert own.max_context >= 8192 and streams_at_once(own, model("8B"), 8192) >= 4


def test_the_bundled_backbone_takes_long_prompts_and_keeps_its_split_on_a_small_machine() -> None:
    half = Portion(kind="cpu", bytes=4 * GIB, speed=2e11)
    assert serve_capacity(model("135M"), half).max_context == 8192
    assert pack_capacity(model("135M"), half).micro_rows == PackSettings().micro_rows


@pytest.mark.parametrize(("name", "held"), [("70B", "24 GB"), ("70B", "8 GB CPU")])
def test_what_fits_nowhere_is_said_with_the_bytes(name: str, held: str) -> None:
    for derive in (serve_capacity, pack_capacity):
        with pytest.raises(DoesNotFit, match=r"needs at least [\d,]+ bytes, 39,519,151,718 of them for the weights"):
            derive(model(name), HELD[held])


@given(st.sampled_from(sorted(CONFIGS)), st.integers(1, 400), st.floats(0, 1e15), st.sampled_from(["cpu", "cuda"]))
def test_any_device_gives_sizes_that_fit_or_says_that_none_do(name: str, gib: int, speed: float, kind: str) -> None:
    held = Portion(kind=kind, bytes=gib * GIB, speed=speed)  # type: ignore[arg-type]
    try:
        own, pack = serve_capacity(model(name), held), pack_capacity(model(name), held)
    except DoesNotFit:
        return
    assert own.given_out <= held.bytes and pack.given_out <= held.bytes
    blocks = own.kv_bytes // (model(name).token_bytes * BLOCK)
    assert ever_fits(own.max_context, blocks=blocks - 1, block_size=BLOCK)
    assert pack.micro_rows <= pack.max_rows and min(own.max_streams, own.max_rows, pack.max_jobs) >= 1
    found = *astuple(own), *astuple(pack), streams_at_once(own, model(name), own.max_context)
    assert [type(size) for size in found] == [int] * len(found), "nobody is given half a row"


def sized(tmp_path: Path, name: str = "135M", gib: int = 12, **given: object) -> tuple[Settings, Settings]:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **CONFIGS[name]}))
    settings = load(home=tmp_path, **given)
    backbone = make_backbone("b", folder=str(tmp_path), dtype="bf16")
    devices = [make_device("n/cpu0", bytes_=gib * GIB), make_device("n/cpu1", bytes_=2 * gib * GIB)]
    return settings, fitted(settings, replace(backbone, sizes=sizes(settings, backbone, devices)))


def test_what_was_not_given_follows_from_the_smallest_device(tmp_path: Path) -> None:
    before, after = sized(tmp_path)
    half = Portion(kind="cpu", bytes=6 * GIB, speed=1e11)
    own, pack = serve_capacity(model("135M"), half), pack_capacity(model("135M"), half)
    assert (after.serve.kv_bytes, after.serve.max_context) == (own.kv_bytes, 8192)
    assert after.serve.max_queued == before.serve.max_queued
    assert (after.pack.memory_bytes, after.pack.max_jobs) == (pack.memory_bytes, pack.max_jobs)


def test_what_was_given_stays_and_the_context_fits_a_cache_that_was_given(tmp_path: Path) -> None:
    serve, pack = ServeSettings(kv_bytes=8 << 20, max_streams=3), PackSettings(micro_rows=700)
    _, after = sized(tmp_path, serve=serve, pack=pack)
    assert (after.serve.kv_bytes, after.serve.max_streams, after.pack.micro_rows) == (8 << 20, 3, 700)
    assert after.serve.max_context == longest_context(model("135M"), 8 << 20) < 8192
    assert after.pack.max_rows >= 700


def test_a_backbone_that_a_device_has_no_room_for_is_refused_with_the_bytes(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"for the weights, and .* device n/cpu0 has 12,884,901,888"):
        sized(tmp_path, "70B")


def test_without_a_device_nothing_is_derived(tmp_path: Path) -> None:
    settings = load(home=tmp_path)
    backbone = make_backbone("b", folder=str(tmp_path))
    assert sizes(settings, backbone, []) == () and fitted(settings, backbone).serve == settings.serve


def test_a_setting_says_how_much_of_a_device_a_pack_and_a_replica_take(tmp_path: Path) -> None:
    settings, after = sized(tmp_path, serve=ServeSettings(bytes=9 * GIB), pack=PackSettings(bytes=3 * GIB))
    most, least = (Portion(kind="cpu", bytes=gib * GIB, speed=1e11) for gib in (9, 3))
    assert after.serve.kv_bytes == serve_capacity(model("135M"), most).kv_bytes
    assert after.pack.memory_bytes == pack_capacity(model("135M"), least).memory_bytes
    found = sizes(settings, make_backbone("b", folder=str(tmp_path), dtype="bf16"), [make_device(bytes_=12 * GIB)])
    backbone = make_backbone("b", sizes=found)
    assert (sized_bytes("serve", backbone), sized_bytes("pack", backbone)) == (9 * GIB, 3 * GIB)


def test_more_than_a_device_has_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"pack.bytes: 13,958,643,712 are asked for, .* n/cpu0 has 12,884,901,888"):
        sized(tmp_path, pack=PackSettings(bytes=13 * GIB))
