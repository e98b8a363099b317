"""Every architecture that reads a text: its bare logits are transformers' own, a LoRA on all its projections PEFT's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from polygraft.grafts.architectures.registry import architectures
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import peft
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.cache import KVCache
from polygraft.grafts.runtime.route import Rows, Span
from polygraft.grafts.runtime.stacks import Resident
from polygraft.grafts.sites import CROSS, LINEAR
from polygraft.grafts.spec import SpecError
from polygraft.launch.demo.oracle.peft_oracle import loaded, peft_oracle
from polygraft.launch.demo.oracle.plain import plain_llama, plain_model
from tests.grafts.oracle.row import LINEAR as LLAMA_NAMES
from tests.grafts.oracle.row import random_tensors, relative
from tests.tiny import CONFIGS

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
IDS = [torch.tensor([5, 17, 300, 42, 8, 511, 3, 99]), torch.arange(2, 40)]
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])


@pytest.fixture(scope="module", params=sorted(CONFIGS.keys() - {"t5", "t5.gated", "vit"}))
def folder(request: pytest.FixtureRequest, tiny_folders: Mapping[str, Path]) -> Path:
    return tiny_folders[request.param]


def logits(backbone: Backbone, graft: BoundGraft | None = None, values: Mapping[str, Tensor] | None = None) -> Tensor:
    """Of both sequences, side by side in one batch."""
    residents = [] if graft is None or values is None else [Resident("g", graft, values)]
    lengths = [len(ids) for ids in IDS]
    spans = (Span(0, sum(lengths), 0),) if residents else ()
    rows = Rows(torch.cat(IDS), torch.cat([torch.arange(n) for n in lengths]), spans)
    attention = WholeSequences(((0, lengths[0]), (lengths[0], lengths[1])), backbone.shape)
    with torch.inference_mode():
        return backbone.logits(backbone.forward(rows, backbone.stacks(residents), attention))


def test_the_tests_know_every_architecture() -> None:
    assert CONFIGS.keys() == architectures().keys()


@DTYPES
@pytest.mark.parametrize("training", [False, True], ids=["serving", "training"])
def test_bare_logits_are_transformers_own(folder: Path, dtype: torch.dtype, training: bool) -> None:
    theirs = plain_model(folder, dtype)
    expected = torch.cat([theirs(ids[None]).logits[0] for ids in IDS])
    assert relative(logits(Backbone.load(folder, dtype, training=training)), expected) < TOLERANCE[dtype]


def test_the_oracles_own_model_is_transformers_own(folder: Path) -> None:
    for ids in IDS:
        expected = plain_model(folder, torch.float64)(ids[None]).logits[0]
        assert relative(plain_llama(folder, torch.float64)(ids[None]).logits[0], expected) < 1e-12


def test_bf16_logits_are_near_transformers_own(folder: Path) -> None:
    theirs = plain_model(folder, torch.bfloat16)
    exact = torch.cat([plain_model(folder, torch.float64)(ids[None]).logits[0] for ids in IDS])
    own = relative(torch.cat([theirs(ids[None]).logits[0] for ids in IDS]), exact)
    assert relative(logits(Backbone.load(folder, torch.bfloat16)), exact) < 1.5 * own


@DTYPES
def test_a_lora_on_every_projection_is_pefts(folder: Path, dtype: torch.dtype) -> None:
    backbone = Backbone.load(folder, dtype)
    graft = BoundGraft(parse("lora(r=4, alpha=6)"), backbone.shape)
    values = random_tensors(graft, seed=5)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=LLAMA_NAMES)
    oracle = peft_oracle(folder, config, values, dtype)
    expected = torch.cat([oracle.logits(ids) for ids in IDS])
    assert relative(logits(backbone, graft, values), expected) < TOLERANCE[dtype]


def test_peft_loads_what_we_save_for_whole_modules(folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(folder, torch.float32)
    graft = BoundGraft(parse("lora(r=4, alpha=6, at=attn.o|ffn.up|ffn.down)@1"), backbone.shape)
    values = random_tensors(graft, seed=6)
    peft.export(tmp_path, graft, values)
    theirs = loaded(folder, tmp_path, torch.float32)
    expected = torch.cat([theirs(input_ids=ids[None]).logits[0] for ids in IDS])
    assert relative(logits(backbone, graft, values), expected) < 1e-5
    found, tensors = peft.load(tmp_path, backbone.shape)
    assert [site for _, site in found.sites] == [site for _, site in graft.sites]
    assert all(tensors[name].equal(value.float()) for name, value in values.items())


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("arch", "target"), [("gpt2", "c_attn"), ("gpt_neox", "query_key_value")])
def test_pefts_lora_on_a_fused_module_is_read_as_its_parts(
    arch: str, target: str, dora: bool, tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = tiny_folders[arch]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=[target], use_dora=dora, fan_in_fan_out=arch == "gpt2")
    model = get_peft_model(plain_model(folder, torch.float32), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
            if "magnitude" in name:
                parameter *= 1 + 0.1 * torch.rand_like(parameter)  # type: ignore[misc]
        model.save_pretrained(str(tmp_path))
        expected = torch.cat([model(input_ids=ids[None]).logits[0] for ids in IDS])
    backbone = Backbone.load(folder, torch.float32)
    assert relative(logits(backbone, *peft.load(tmp_path, backbone.shape)), expected) < 1e-5


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox"])
def test_a_part_of_a_fused_module_is_not_exported(arch: str, tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    backbone = Backbone.load(tiny_folders[arch], torch.float32)
    graft = BoundGraft(parse("lora(at=attn.q)"), backbone.shape)
    assert not peft.exportable(graft)
    with pytest.raises(FormatError, match=f"no target_modules of {arch} mean just 'attn.q'"):
        peft.export(tmp_path, graft, random_tensors(graft, seed=6))


@pytest.mark.parametrize(
    ("arch", "at", "expected"),
    [
        ("gpt2", "linear", ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down"]),
        ("gpt2", "c_attn", ["attn.q", "attn.k", "attn.v"]),
        ("gpt2", "c_proj", ["attn.o", "ffn.down"]),
        ("gpt2", "mlp.c_proj", ["ffn.down"]),
        ("bert", "query|value", ["attn.q", "attn.v"]),
        ("bert", "output.dense", ["attn.o", "ffn.down"]),
        ("bert", "attention.output.dense", ["attn.o"]),
        ("opt", "fc1|out_proj", ["attn.o", "ffn.up"]),
        ("qwen3", "all-linear", [name for name in LINEAR if name not in CROSS]),
    ],
)
def test_pefts_module_names_mean_sites(
    arch: str, at: str, expected: list[str], tiny_folders: Mapping[str, Path]
) -> None:
    shape = Backbone.load(tiny_folders[arch], torch.float32).shape
    assert [site.name for _, site in BoundGraft(parse(f"lora(at={at})@0"), shape).sites] == expected


def test_a_site_that_is_not_there_is_an_error_that_lists_those_that_are(tiny_folders: Mapping[str, Path]) -> None:
    shape = Backbone.load(tiny_folders["gpt2"], torch.float32).shape
    with pytest.raises(SpecError, match=r"'ffn.gate' matches no site of gpt2.*sites: attn.q, .*attn.o, ffn.up"):
        BoundGraft(parse("lora(at=ffn.gate)"), shape)


def test_an_encoder_has_no_cache(tiny_folders: Mapping[str, Path]) -> None:
    with pytest.raises(SpecError, match="bert is an encoder"):
        KVCache(Backbone.load(tiny_folders["bert"], torch.float32).shape, 4, dtype=torch.float32)
