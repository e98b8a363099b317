"""An encoder and a decoder: logits and the loss of labels are transformers' own, LoRA on all projections is PEFT's, and
grafts of many kinds share a batch of pairs without changing each other's bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import merged, peft
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.cache import KVCache
from polygraft.grafts.runtime.stacks import Resident
from polygraft.grafts.sites import Site, model_path
from polygraft.grafts.spec import SpecError
from polygraft.launch.demo.oracle.plain import plain_model, read, source
from tests.grafts.oracle.row import random_tensors, relative
from tests.grafts.packing import assert_same_bits_in_company, packed

IDS = [torch.tensor([5, 17, 300, 42, 8, 511, 3, 99]), torch.arange(2, 40), torch.tensor([7])]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
TEXTS = ("lora(r=4)", "prompt(5)", "dora(r=2, at=cross.*)", "prefix(3)", "ia3(at=cross.[kv]|attn.[kv])", "houlsby(6)",
         "bitfit", "parallel(4, at=ffn.out|cross.out)")  # fmt: skip


@pytest.fixture(scope="module", params=["t5", "t5.gated"])
def folder(request: pytest.FixtureRequest, tiny_folders: Mapping[str, Path]) -> Path:
    return tiny_folders[request.param]


def logits(backbone: Backbone, residents: Sequence[Resident] = ()) -> Tensor:
    grafts = [(0, residents[0].spec)] if residents else [(None, None)]
    rows, attention, answers = packed(backbone, grafts, [IDS])
    with torch.inference_mode():
        hidden = backbone.forward(rows, backbone.stacks(residents), attention)
    return backbone.logits(hidden[torch.cat(answers)])


@DTYPES
@pytest.mark.parametrize("training", [False, True], ids=["serving", "training"])
def test_bare_logits_are_transformers_own(folder: Path, dtype: torch.dtype, training: bool) -> None:
    theirs = plain_model(folder, dtype)
    expected = torch.cat([read(theirs, ids) for ids in IDS])
    assert relative(logits(Backbone.load(folder, dtype, training=training)), expected) < TOLERANCE[dtype]


def test_bf16_logits_are_near_transformers_own(folder: Path) -> None:
    exact, theirs = plain_model(folder, torch.float64), plain_model(folder, torch.bfloat16)
    truth = torch.cat([read(exact, ids) for ids in IDS])
    own = relative(torch.cat([read(theirs, ids) for ids in IDS]), truth)
    assert relative(logits(Backbone.load(folder, torch.bfloat16)), truth) < 1.5 * own


@DTYPES
def test_the_loss_of_labels_and_its_gradient_are_pefts(folder: Path, dtype: torch.dtype) -> None:
    """LoRA by PEFT on transformers' own class and module names, trained on labels, which it shifts by itself."""
    backbone = Backbone.load(folder, dtype)
    graft = BoundGraft(parse("lora(r=4, alpha=6)"), backbone.shape)
    values = random_tensors(graft, seed=5)
    names = ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"]
    theirs = get_peft_model(plain_model(folder, dtype), LoraConfig(r=4, lora_alpha=6, target_modules=names),
                            autocast_adapter_dtype=False)  # fmt: skip
    theirs.eval()
    places = {}
    for name in values:
        _, layer, *site, part = name.split(".")
        module = f"base_model.model.{model_path(Site(int(layer), '.'.join(site)), backbone.shape)}"
        places[name] = theirs.get_parameter(f"{module}.lora_{part}.default.weight")
        with torch.no_grad():
            places[name].copy_(values[name].T if part == "B" else values[name])
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == sum(v.numel() for v in values.values())
    theirs.config.pad_token_id = theirs.config.decoder_start_token_id = 0
    loss = sum(len(ids) * theirs(input_ids=source(ids)[None], labels=ids[None]).loss for ids in IDS)
    loss.backward()

    stacks = backbone.stacks([Resident("g", graft, values)], trainable=True)
    shifted = [torch.cat([torch.tensor([0]), ids[:-1]]) for ids in IDS]
    rows, attention, answers = packed(backbone, [(0, graft.spec)], [shifted], [[source(ids) for ids in IDS]])
    hidden = backbone.forward(rows, stacks, attention)
    scores = backbone.logits(hidden[torch.cat(answers)].detach()).requires_grad_()
    own = F.cross_entropy(scores, torch.cat(IDS), reduction="sum")
    own.backward()
    assert scores.grad is not None
    hidden[torch.cat(answers)].backward(backbone.head.transposed_product(scores.grad.to(dtype)))
    assert relative(own, loss) < TOLERANCE[dtype]
    for piece, gradient in zip(stacks.views[0], stacks.gradients()[0], strict=True):
        wanted = places[piece.tensor.name].grad
        assert wanted is not None and gradient is not None
        wanted = wanted.T if piece.tensor.part == "B" else wanted
        assert relative(gradient.view(wanted.shape), wanted) < 10 * TOLERANCE[dtype], piece.tensor.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_gradient_has_the_same_bits_alone_and_in_company(one_thread: None, folder: Path, dtype: torch.dtype) -> None:
    backbone = Backbone.load(folder, dtype, training=True)
    assert_same_bits_in_company(lambda jobs: gradients(backbone, jobs), TEXTS)


def test_a_merged_model_gives_the_grafts_logits(folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(folder, torch.float32)
    graft = BoundGraft(parse("lora(r=4, alpha=6)"), backbone.shape)
    values = random_tensors(graft, seed=6)
    merged.export(tmp_path / "merged", graft, values, backbone=folder)
    whole = plain_model(tmp_path / "merged", torch.float32)
    expected = torch.cat([read(whole, ids) for ids in IDS])
    assert relative(logits(backbone, [Resident("g", graft, values)]), expected) < 1e-5


@pytest.mark.parametrize("text", ["lora(r=4, alpha=6)", "dora(r=4, at=cross.[qv]|attn.o)@3", "ia3", "vera(r=8, at=q)"])
def test_peft_loads_what_we_save_and_we_what_it_has(folder: Path, tmp_path: Path, text: str) -> None:
    backbone = Backbone.load(folder, torch.float32)
    graft = BoundGraft(parse(text), backbone.shape)
    values = {name: value.float() for name, value in random_tensors(graft, seed=6).items()}
    peft.export(tmp_path, graft, values)
    theirs = PeftModel.from_pretrained(plain_model(folder, torch.float32), str(tmp_path)).eval()
    expected = torch.cat([read(theirs, ids) for ids in IDS])
    assert relative(logits(backbone, [Resident("g", graft, values)]), expected) < 1e-5
    found, tensors = peft.load(tmp_path, backbone.shape)
    assert relative(logits(backbone, [Resident("g", found, tensors)]), expected) < 1e-5


def test_edited_tokens_are_edited_in_what_both_stacks_read(folder: Path) -> None:
    backbone = Backbone.load(folder, torch.float64)
    graft = BoundGraft(parse("trainable-tokens(42|300)"), backbone.shape)
    values, theirs = random_tensors(graft, seed=8), plain_model(folder, torch.float64)

    def embed(ids: Tensor) -> Tensor:
        rows = theirs.get_input_embeddings()(ids)
        for token, row in zip((42, 300), values["0.0.embed.p"], strict=True):
            rows = torch.where((ids == token).unsqueeze(1), row, rows)
        return rows[None]

    expected = [theirs(inputs_embeds=embed(source(i)), decoder_inputs_embeds=embed(i)).logits[0] for i in IDS]
    assert relative(logits(backbone, [Resident("g", graft, values)]), torch.cat(expected)) < 1e-9


def test_names_mean_both_attentions_and_patterns_one(tiny_folders: Mapping[str, Path]) -> None:
    shape = Backbone.load(tiny_folders["t5"], torch.float32).shape
    texts = ("q", "attn.q", "cross.*")
    names = {at: [str(site) for _, site in BoundGraft(parse(f"lora(at={at})"), shape).sites] for at in texts}
    assert names["q"] == ["0.attn.q", "1.attn.q", "2.attn.q", "2.cross.q", "3.attn.q", "3.cross.q"]
    assert names["attn.q"] == ["0.attn.q", "1.attn.q", "2.attn.q", "3.attn.q"]
    assert names["cross.*"] == [f"{layer}.cross.{part}" for layer in (2, 3) for part in "qkvo"]
    assert [str(site) for _, site in BoundGraft(parse("ssf"), shape).sites if site.name == "norm.final"] == [
        "1.norm.final",
        "3.norm.final",
    ]


def test_what_is_not_done_is_refused(tiny_folders: Mapping[str, Path]) -> None:
    backbone = Backbone.load(tiny_folders["t5"], torch.float32)
    with pytest.raises(SpecError, match=r"t5 is an encoder and a decoder.*cannot decode"):
        KVCache(backbone.shape, 4, dtype=torch.float32)
    rows, attention, _ = packed(backbone, [(None, None)], [IDS])
    with pytest.raises(SpecError, match="each with a source"):
        backbone.forward(type(rows)(rows.ids, rows.positions, ()), backbone.stacks([]), attention)
    with pytest.raises(SpecError, match=r"layers: 'cross.q' stands in none of them"):
        BoundGraft(parse("lora(at=cross.q)@0"), backbone.shape)
    with pytest.raises(SpecError, match="aside: rows without a place"):
        BoundGraft(parse("llama-adapter(6)"), backbone.shape)
    with pytest.raises(SpecError, match="starts from a job's text"):
        initialise(BoundGraft(parse("lora-ga"), backbone.shape), backbone, seed=0, samples=((1, 2, 3),))


def gradients(backbone: Backbone, jobs: tuple[int, ...]) -> list[list[Tensor]]:
    """Of each job's loss on pairs of its own."""
    residents, prompts = [], []
    for job in jobs:
        noise = torch.Generator().manual_seed(job)
        graft = BoundGraft(parse(TEXTS[job]), backbone.shape)
        start = initialise(graft, backbone, seed=job, samples=((5, 6, 7),))
        values = {name: value + 0.1 * torch.randn(value.shape, generator=noise) for name, value in start.items()}
        residents.append(Resident(str(job), graft, values))
        lengths = torch.randint(2, 60, (2,), generator=noise).tolist()
        prompts.append([torch.randint(2, 512, (n,), generator=noise) for n in lengths])
    stacks = backbone.stacks(residents, trainable=True)
    grafts = [(i, resident.spec) for i, resident in enumerate(residents)]
    rows, attention, answers = packed(backbone, grafts, prompts)
    hidden = backbone.forward(rows, stacks, attention)
    slope = torch.zeros_like(hidden)
    for places, ids in zip(answers, [ids for own in prompts for ids in own], strict=True):
        generator = torch.Generator().manual_seed(len(ids))
        slope[places] = torch.randn(len(ids), hidden.shape[1], generator=generator).to(hidden.dtype)
    hidden.backward(slope)
    found = stacks.gradients()
    return [[g.clone() for g in stacks.gradient(i, found[i]) if g is not None] for i in range(len(jobs))]
