"""PEFT's folders of every method it has: PEFT computes the same from what we write, we from what PEFT writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PsoftConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import peft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.formats.peft_config import asked_for
from polygraft.grafts.grammar import Term, parse, terms, union
from polygraft.grafts.init import initialise
from polygraft.grafts.methods.registry import find
from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.embedding import virtual_ids
from polygraft.grafts.runtime.route import Rows, Span
from polygraft.grafts.runtime.stacks import Resident
from polygraft.grafts.spec import GraftSpec, SpecError
from polygraft.launch.demo.oracle.peft_oracle import loaded
from polygraft.launch.demo.oracle.plain import plain_model
from tests.grafts.oracle.row import LINEAR, random_tensors, relative
from tests.grafts.oracle.table import ALL
from tests.grafts.oracle.trained import trained
from tests.tiny import tiny_llama

IDS = torch.tensor([5, 17, 300, 42, 8, 511, 0, 99])
THEIRS = {name: row for name, row in ALL.items() if row.config is not None}
MULTITASK = "multitask prompt tuning"
TOKENS = "trainable tokens"
FIELDS = {"unilora": {"save_indices": True}}  # which PEFT draws again otherwise
PLAINER = ("bdlora", "olora", "pissa", "psoft")  # written as the LoRA that they are
MORE_OF_ONE = ("road 2", "road 4", "eva", "mica", "orthogonal", "lora-fa", "lora-plus", "dylora", "lora-dropout")
CUDA_ONLY = ("boft of three factors",)
OURS_ALONE = {  # PEFT has nothing like these
    "bitfit",
    "ssf",
    "serial",
    "serial with biases",
    "parallel",
    "parallel at projections with biases",
    "scaled-parallel",
    "pfeiffer",
    "adaptformer",
    "adapterdrop",
    "adapter-drop",
    "averaged-adapters",
    "compacter",
    "compacter++",
    "phm",
    "sparse-adapter",
    "propetl",
    "hypernet-adapter",
    "fusion",
    "mam",
    "unipelt",
    "unipelt-al",
    "apt",
    "autopeft",
    "krona",
    "kadaptation",
    "hiwi",
    "said",
    "peqa",
    "peqa in groups",
    "bitdelta",
    "binary-adapter",
    "qalora",
    "molora",
    "molora top 2",
    "hydralora",
    "meteora",
    "output-gated-loras",
    "loreft",
    "loreft of all tokens",
    "reft of each end",
    "noreft",
    "direft",
    "dept",
    "smop",
    "idpg",
    "lpt",
    "lpt through all layers",
    "pafi",
    "fishmask",
    "moving-mask",
    "moved-rows",
    "moved-rows everywhere",
    "spt",
    "lt-sft",
    "diff-pruning",
    "diff-pruning by groups",
    "child-tuning",
    "s-bitfit",
}
NOT_THERE = {  # where PEFT's module is another, or the folder could not hold it
    "qwen2": "llama-adapter",
    "gemma": "llama-adapter|trainable-tokens",
    "phi": "llama-adapter",
    "opt": "llama-adapter|trainable-tokens",
    "gpt2": "beft|bat|glora|glora of vectors|loha|lokr|lokr with a wished factor|peanut|llama-adapter"
    "|trainable-tokens|oft|oft exact|boft|hra|road|road 2|road 4|shira|supertuning|supra|c3a|c3a by PEFT",
    "bert": "prefix|prefix-mlp|prompt|p-tuning|p-tuning by lstm|spot|ipt|from|cartridge|dpt|residual-prompt|mpt"
    "|pruned-prompt|llama-adapter|trainable-tokens|cpt",
}


@pytest.fixture(scope="module")
def tied(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float32)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("untied"), tied=False), torch.float32)


@pytest.fixture
def backbone(name: str, tied: Backbone, untied: Backbone) -> Backbone:
    return untied if name in (TOKENS, "trainable-tokens") else tied


def ours(backbone: Backbone, graft: BoundGraft, values: dict[str, Tensor]) -> Tensor:
    virtual = torch.tensor(virtual_ids(graft.virtual_length), dtype=torch.long)
    ids = torch.cat([virtual, IDS])
    rows = Rows(ids, torch.arange(len(ids)) + graft.prefix_length, (Span(0, len(ids), 0),))
    attention = WholeSequences(((0, len(ids)),), backbone.shape)
    with torch.inference_mode():
        hidden = backbone.forward(rows, backbone.stacks([Resident("g", graft, values)]), attention)
        return backbone.logits(hidden[len(virtual) :])


def theirs(model: PeftModel) -> Tensor:
    several = isinstance(model.peft_config["default"], MultitaskPromptTuningConfig)
    tasks = {"task_ids": torch.zeros(1, dtype=torch.long)} if several else {}
    with torch.inference_mode():
        found: Tensor = model.eval()(input_ids=IDS[None], use_cache=False, **tasks).logits[0, -len(IDS) :]
    return found


EXTRA: Mapping[str, Callable[[], PeftConfig]] = {
    MULTITASK: lambda: MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_tasks=1),
    TOKENS: lambda: TrainableTokensConfig(token_indices=[17, 42]),
    "pissa": lambda: LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, init_lora_weights="pissa"),
    "olora": lambda: LoraConfig(r=4, lora_alpha=6, target_modules=["v_proj", "up_proj"], init_lora_weights="olora"),
    "psoft": lambda: PsoftConfig(r=4, psoft_alpha=6, target_modules=LINEAR),
}


def config_of(name: str) -> PeftConfig:
    make = EXTRA[name] if name in EXTRA else THEIRS[name].config
    assert make is not None
    return dataclasses.replace(make(), **FIELDS.get(name, {}))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in ALL if name not in CUDA_ONLY])
def test_peft_computes_the_same_from_what_we_write(
    name: str, backbone: Backbone, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    graft = ALL[name].graft(backbone.shape)
    values, backbone_files = values_of(name, graft, backbone), BackboneFiles(backbone.folder)
    assert peft.exportable(graft, backbone_files) == (name not in OURS_ALONE)
    if name in OURS_ALONE:
        assert name not in THEIRS
        with pytest.raises(FormatError, match="has no equal in PEFT"):
            peft.export(tmp_path, graft, values, backbone_files=backbone_files)
        return
    peft.export(tmp_path, graft, values, backbone_files=backbone_files)
    model = loaded(backbone.folder, tmp_path, torch.float32)
    assert relative(ours(backbone, graft, values), theirs(model)) < 1e-5
    if name != "randlora":  # whose bases PEFT writes for every module again
        assert not [str(w.message) for w in recwarn if "key" in str(w.message)]  # "Found missing adapter keys"


@pytest.mark.parametrize("name", [*THEIRS, *EXTRA])
def test_we_compute_the_same_from_what_peft_writes_and_write_it_again(
    name: str, backbone: Backbone, tmp_path: Path
) -> None:
    model = trained(backbone.folder, config_of(name), tmp_path)
    backbone_files = BackboneFiles(backbone.folder)
    graft, values = peft.load(tmp_path, backbone.shape, backbone_files)
    assert relative(ours(backbone, graft, values), theirs(model)) < 1e-5
    (again := tmp_path / "again").mkdir()
    peft.export(again, graft, values, backbone_files=backbone_files)
    if name in PLAINER:
        assert relative(theirs(loaded(backbone.folder, again, torch.float32)), theirs(model)) < 1e-5
        assert relative(theirs(loaded(backbone.folder, tmp_path, torch.float32)), theirs(model)) < 1e-5
        return
    before, after = (load_file(folder / peft.WEIGHTS) for folder in (tmp_path, again))
    copies = {key for key in before if "layers" in key and key.rpartition(".")[2] in ("randlora_A", "randlora_B")}
    assert after.keys() == before.keys() - copies
    assert all(value.equal(before[key]) and value.dtype == before[key].dtype for key, value in after.items())
    configs = [json.loads((folder / peft.CONFIG).read_text()) for folder in (tmp_path, again)]
    made = ("P_TUNING", "CPT")  # PEFT keeps the prompt that these make
    assert configs[1]["peft_type"] == ("PROMPT_TUNING" if (kind := configs[0]["peft_type"]) in made else kind)


OTHERS = ("qwen2", "gemma", "phi", "opt", "gpt2", "bert")
SOME = ("lora", "dora", "ia3", "vera", "oft", "tinylora", "shira", "prefix", "prompt")


@pytest.mark.parametrize("arch", OTHERS)
@pytest.mark.parametrize(
    "name", [n if n in SOME else pytest.param(n, marks=pytest.mark.nightly) for n in ALL if n not in CUDA_ONLY]
)
def test_on_other_architectures_peft_computes_the_same_and_the_folder_comes_back(
    arch: str, name: str, backbones: Mapping[str, Backbone], tmp_path: Path
) -> None:
    """On GPT-2 where q, k and v have no modules of their own, at the others."""
    backbone = backbones[arch]
    spec = parse(ALL[name].text) if arch != "gpt2" else whole_modules(ALL[name].text)
    backbone_files = BackboneFiles(backbone.folder)
    try:
        graft = BoundGraft(spec, backbone.shape)
    except SpecError:
        pytest.skip(f"{arch} has not the method's sites")
    missing = name in OURS_ALONE or name in NOT_THERE[arch].split("|")
    assert peft.exportable(graft, backbone_files) != missing
    if missing:
        pytest.skip("PEFT has nothing like it there")
    if (arch, name) == ("opt", "poly"):
        pytest.skip("PEFT's layer needs rows by sequence, and OPT's feed-forward gives them flat")
    values = values_of(name, graft, backbone)
    peft.export(tmp_path, graft, values, backbone_files=backbone_files)
    expected = ours(backbone, graft, values)
    assert relative(expected, theirs(loaded(backbone.folder, tmp_path, torch.float32))) < 1e-5
    assert relative(ours(backbone, *peft.load(tmp_path, backbone.shape, backbone_files)), expected) < 1e-6


@pytest.fixture(scope="module")
def backbones(tiny_folders: Mapping[str, Path]) -> Mapping[str, Backbone]:
    return {arch: Backbone.load(tiny_folders[arch], torch.float32) for arch in OTHERS}


def values_of(name: str, graft: BoundGraft, backbone: Backbone) -> dict[str, Tensor]:
    """Of a graft that has been trained; FRoD's basis is the one of W, which PEFT makes again."""
    values = ALL[name].fixed(random_tensors(graft, seed=4))
    if name == "frod":
        moved = {t.name for t in graft.tensors if t.trained}
        start = initialise(graft, backbone, seed=4, samples=())
        values = {tensor: value + (tensor in moved) * values[tensor] for tensor, value in start.items()}
    return {tensor: value.float() for tensor, value in values.items()}


def whole_modules(text: str) -> GraftSpec:
    found = [
        Term(one.name, dict(one.arguments) | ({"at": "attn.o|ffn.*"} if "at" in find(one.name).arguments else {}))
        for one in terms(text)
    ]
    return union([Term(one.name, {**one.arguments, "feedforward": ""}) if one.name == "ia3" else one for one in found])


ODD: tuple[object, ...] = (None, True, False, "x", "", -1, 0, 10**30, 1.5, 1e308, [], [1], ["x"], [[1]], {}, {"x": [1]})


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("lora", "oft", "prefix", "vera") else pytest.param(name, marks=pytest.mark.nightly)
        for name in THEIRS
        if name not in MORE_OF_ONE
    ],
)
def test_an_odd_value_of_any_field_is_an_error_of_ours(name: str, backbone: Backbone, tmp_path: Path) -> None:
    """Or does no harm, whatever the field; for a job's config, too."""
    make = THEIRS[name].config
    assert make is not None
    peft_model = get_peft_model(plain_model(backbone.folder, torch.float32), config_of(name))
    peft_model.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    refused, backbone_files = 0, BackboneFiles(backbone.folder)
    for field in config:
        for value in ODD:
            changed = config | {field: value}
            (tmp_path / peft.CONFIG).write_text(json.dumps(changed))
            try:
                peft.load(tmp_path, backbone.shape, backbone_files)
            except FormatError:
                refused += 1
            with suppress(SpecError):
                asked_for(json.dumps(changed), backbone.shape, backbone_files)
    assert refused > len(ODD)
