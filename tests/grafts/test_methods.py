"""Every method of the table: what its oracle computes, the same in company, as it is served, saved and counted.

On Llama every method, on GPT-2, BERT, ViT and T5 the first eight, and every night all; some where layers have windows
that are shorter than the sequences. A row is skipped where the architecture has none of its sites or PEFT has the
method for Llama alone, and decoding where rows see more than the rows before them (an encoder).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from polygraft.grafts.formats import native
from polygraft.grafts.grammar import terms
from polygraft.grafts.init import initialise
from polygraft.grafts.lowering import lower
from polygraft.grafts.methods.registry import find
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.cache import KVCache, PagedAttention, PagedSequence
from polygraft.grafts.runtime.embedding import virtual_ids
from polygraft.grafts.runtime.route import Input, Rows, Span
from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.grafts.spec import SpecError
from polygraft.launch.demo.oracle.plain import Oracle
from tests.grafts.oracle.row import Row, relative
from tests.grafts.oracle.table import ALL, METHODS
from tests.grafts.packing import PROMPT, packed

LENGTHS = (7, 20)
OTHERS = ("lora", "prefix", "ia3")  # who rides beside the method
# Beside the first eight in each run: visual prompts (VPT), scale and shift, a prompt below which positions are learned,
# one that is made where an encoder reads.
MORE = (("vit", "prompt"), ("vit", "ssf"), ("gpt2", "lpt"), ("t5", "smop"))


def cases() -> Iterator[ParameterSet]:
    for arch in ("llama", "gpt2", "bert", "vit", "t5"):
        for name in ALL:
            marks = [] if arch == "llama" or name in METHODS or (arch, name) in MORE else [pytest.mark.nightly]
            yield pytest.param((arch, name), marks=marks, id=name if arch == "llama" else f"{arch}-{name}")
    for arch in ("mistral", "gemma2", "gemma3_text"):
        for name in ("dora", "prefix", "serial", "lpt"):
            yield pytest.param((arch, name), id=f"{arch}-{name}")
    for name in ("apt", "llama-adapter"):  # scores of rows that no cache holds are capped, too
        yield pytest.param(("gemma2", name), id=f"gemma2-{name}")


class Backbones(dict[tuple[str, torch.dtype], Backbone]):
    """Loaded when first asked for."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        super().__init__()
        self._folders = folders

    def __missing__(self, key: tuple[str, torch.dtype]) -> Backbone:
        self[key] = Backbone.load(self._folders[key[0]], key[1])
        return self[key]


@pytest.fixture(scope="module")
def backbones(tiny_folders: Mapping[str, Path]) -> Backbones:
    return Backbones(tiny_folders)


pytestmark = pytest.mark.parametrize("case", [*cases()])  # (architecture, row), which the fixtures read


@pytest.fixture
def fp64(case: tuple[str, str], backbones: Backbones) -> Backbone:
    return backbones[case[0], torch.float64]


@pytest.fixture
def fp32(case: tuple[str, str], backbones: Backbones) -> Backbone:
    return backbones[case[0], torch.float32]


@pytest.fixture
def name(case: tuple[str, str], backbones: Backbones) -> str:
    reason = ALL[case[1]].unfit(backbones[case[0], torch.float32].shape)
    if reason is not None:
        assert case[0] != "llama"
        pytest.skip(reason)
    return case[1]


@pytest.mark.equality("oracle", rows=ALL)
def test_logits_and_gradients_are_the_oracles_alone_and_in_company(name: str, fp64: Backbone) -> None:
    """In float64, where nothing but rounding may be left: 1e-9, or what the oracle's own arithmetic allows."""
    row, prompts, slopes = ALL[name], *batch(fp64)
    values = row.values(fp64.shape, seed=3)
    expected, wanted = judged(row.oracle(fp64.folder, values, fp64.dtype), prompts, slopes)
    alone, own = ours([(row, values)], fp64, prompts, slopes)
    company = [(row, values), *((METHODS[other], METHODS[other].values(fp64.shape, seed=4)) for other in OTHERS)]
    packed, among = ours(company, fp64, prompts, slopes)
    assert relative(alone, expected) < row.tolerance
    assert relative(packed, alone) < 1e-9
    trained = [t.name for t in row.graft(fp64.shape).tensors if t.trained]
    assert list(own) == trained and set(wanted) == set(trained)
    largest = max(float(wanted[tensor].norm()) for tensor in trained)
    for tensor in trained:
        assert wanted[tensor].norm() > 0, f"{tensor} plays no part"
        if cancels(tensor, fp64):
            assert max(g[tensor].norm() for g in (own, among, wanted)) < 1e-12 * largest, tensor
            continue
        assert relative(own[tensor], wanted[tensor]) < row.tolerance, tensor
        assert relative(among[tensor], own[tensor]) < 1e-9, tensor


@pytest.mark.equality("mixed", rows=ALL)
def test_decoding_in_company_gives_the_oracles_logits(name: str, fp32: Backbone) -> None:
    """As it is served, lowered, chunk by chunk from the cache, beside other grafts and the bare backbone: 1e-5."""
    if not fp32.shape.causal:
        pytest.skip(f"{fp32.shape.arch} is an encoder: it does not decode")
    row = ALL[name]
    values = {tensor: value.float() for tensor, value in row.values(fp32.shape, seed=5).items()}
    lone = METHODS["lora"].values(fp32.shape, seed=6)
    residents = [
        Resident("own", *lower(row.graft(fp32.shape), values, fp32.weight, fp32.run_from_layer)),
        Resident("other", METHODS["lora"].graft(fp32.shape), lone),
    ]
    ids = batch(fp32)[0][1]
    found = decoded(fp32, residents, ids, chunks=(9, 6, 1, 1, 1, 1, 1))
    oracle = row.oracle(fp32.folder, {k: v.double() for k, v in values.items()}, torch.float32)
    assert relative(found, oracle.logits(ids)) < 1e-5


def test_a_saved_graft_comes_back_with_its_id(name: str, fp32: Backbone, tmp_path: Path) -> None:
    graft = ALL[name].graft(fp32.shape)
    values = {tensor: value.float() for tensor, value in ALL[name].values(fp32.shape, seed=7).items()}
    identity = native.save(tmp_path, graft, values, backbone="b")
    stored = native.load(tmp_path / identity, shape=fp32.shape, backbone="b")
    assert stored.id == identity and stored.graft == graft
    assert all(torch.equal(stored.tensors[tensor], value) for tensor, value in values.items())


def test_the_count_is_that_of_the_tensors_it_starts_with(name: str, fp32: Backbone) -> None:
    graft = ALL[name].graft(fp32.shape)
    samples, sources = ((5, 6, 7, 8), (9, 10, 11)), ALL[name].sources(fp32.shape)
    if any(find(term.name).quantised for term in terms(graft.spec.method)):
        fp32 = Backbone.load(fp32.folder, torch.float32, quantise="nf4")
    try:
        values = initialise(graft, fp32, seed=0, samples=samples, sources=sources)
    except SpecError as error:
        assert fp32.shape.images or fp32.shape.encoder_layers
        pytest.skip(str(error))
    layout = graft.tensors
    assert [(t.name, t.shape) for t in layout] == [(n, tuple(v.shape)) for n, v in values.items()]
    assert graft.parameters == sum(values[t.name].numel() for t in layout if t.trained)
    assert all(value.isfinite().all() for value in values.values())


def cancels(tensor: str, backbone: Backbone) -> bool:
    """Whether a tensor adds one vector to all keys, which without rotary positions no softmax sees."""
    return backbone.shape.arch in ("gpt2", "bert", "vit", "t5") and tensor.endswith((".attn.k.b", ".cross.k.b"))


def batch(backbone: Backbone) -> tuple[list[Tensor], list[Tensor]]:
    """Token ids of every sequence, or what decides an image, and a random slope of the loss in every logit."""
    generator = torch.Generator().manual_seed(11)
    rows, outputs = ((1, 1) if backbone.shape.images else LENGTHS), backbone.head.out_features
    prompts = [torch.randint(0, outputs, (n,), generator=generator) for n in LENGTHS]
    slopes = [torch.randn(n, outputs, generator=generator).to(backbone.dtype) for n in rows]
    return prompts, slopes


def judged(oracle: Oracle, prompts: Sequence[Tensor], slopes: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    logits = torch.cat([oracle.logits(ids) for ids in prompts])
    (logits * torch.cat(list(slopes))).sum().backward()
    return logits, oracle.gradients()


def ours(
    grafts: Sequence[tuple[Row, Mapping[str, Tensor]]],
    backbone: Backbone,
    prompts: Sequence[Tensor],
    slopes: Sequence[Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of the first graft over the sequences, each other graft having the same beside it."""
    residents = [Resident(str(i), row.graft(backbone.shape), values) for i, (row, values) in enumerate(grafts)]
    stacks = backbone.stacks(residents, trainable=True)
    specs = [(graft, row.spec) for graft, (row, _) in enumerate(grafts)]
    rows, attention, answers = packed(backbone, specs, [prompts] * len(grafts))
    hidden = backbone.forward(rows, stacks, attention)[torch.cat(answers)]
    slope = backbone.softcap_backward(torch.cat([*slopes] * len(grafts)), backbone.logits(hidden.detach()))
    hidden.backward(backbone.head.transposed_product(slope))  # logits = hidden W^T, but for a cap
    found = stacks.gradient(0, stacks.gradients()[0])
    trained = [t for t in residents[0].graft.tensors if t.trained]
    gradients = {t.name: g.view(t.shape) for t, g in zip(trained, found, strict=True) if g is not None}
    with torch.no_grad():
        return backbone.logits(hidden[: sum(map(len, slopes))]), gradients


def decoded(backbone: Backbone, residents: Sequence[Resident], ids: Tensor, chunks: Sequence[int]) -> Tensor:
    """Logits of `ids` under the first resident, in chunks, while the second and the bare backbone take the same."""
    stacks: Stacks = backbone.stacks(residents)
    cache = KVCache(backbone.shape, 16, dtype=backbone.dtype)
    cache.clear(range(16))
    tables = [tuple(range(1 + 4 * i, 5 + 4 * i)) for i in range(3)]
    prefixes = [resident.spec.prefix_length for resident in residents] + [0]
    for resident, table in zip(residents, tables, strict=False):  # the last table is the bare backbone's
        cache.write_prefix(table, resident)
    virtual = residents[0].spec.virtual_length
    own = torch.cat([torch.tensor(virtual_ids(virtual), dtype=torch.long), ids])
    logits, done = [], 0
    for chunk in (virtual + chunks[0], *chunks[1:]):
        sequences, positions, spans = [], [], []
        for i, (table, prefix) in enumerate(zip(tables, prefixes, strict=True)):
            layers = residents[i].spec.prefix_layers if i < len(residents) else None
            sequences.append(PagedSequence(i * chunk, chunk, prefix + done, table, prefix, layers))
            positions.append(torch.arange(chunk) + prefix + done)
            spans += [Span(i * chunk, (i + 1) * chunk, i)] if i < len(residents) else []
        taken = own[done : done + chunk]
        inputs = (Input(virtual, virtual + PROMPT),) if not done else ()
        mixed = torch.cat([taken, *[taken.clamp_min(0)] * 2])
        rows = Rows(mixed, torch.cat(positions), tuple(spans), inputs=inputs)
        with torch.inference_mode():
            hidden = backbone.forward(rows, stacks, PagedAttention(cache, sequences))
            logits.append(backbone.logits(hidden[:chunk]))
        done += chunk
    return torch.cat(logits)[virtual:]
