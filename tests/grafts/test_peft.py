"""PEFT folders: PEFT loads what we save, we load what PEFT saves, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native, peft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.route import Rows, Span
from polygraft.grafts.runtime.stacks import Resident
from polygraft.grafts.spec import Branch, GraftSpec
from polygraft.launch.demo.oracle.peft_oracle import loaded
from polygraft.launch.demo.oracle.plain import plain_model
from tests.grafts.oracle.row import LINEAR, random_tensors, relative
from tests.grafts.oracle.trained import trained

IDS = torch.tensor([5, 17, 300, 42, 8, 511, 0, 99])
Q = "base_model.model.model.layers.0.self_attn.q_proj"
TEXTS = [
    "lora(r=8, alpha=16)",
    "lora(r=3, alpha=5, at=attn.[qv]|ffn.down)@1",
    "rslora(r=8, alpha=6, dropout=0.1)",
    "dora(r=4, alpha=2, at=attn.*)",
    "dora(r=4)@0",
]


@pytest.fixture(scope="module")
def backbone(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float32)


@pytest.fixture
def adapter(backbone: Backbone, tmp_path: Path) -> Path:
    graft = BoundGraft(parse("lora(r=4, alpha=8, at=attn.[qv])"), backbone.shape)
    peft.export(tmp_path, graft, random_tensors(graft, seed=1))
    return tmp_path


def logits(backbone: Backbone, graft: BoundGraft, values: dict[str, Tensor]) -> Tensor:
    stacks = backbone.stacks([Resident("g", graft, values)])
    rows = Rows(IDS, torch.arange(len(IDS)), (Span(0, len(IDS), 0),))
    with torch.inference_mode():
        return backbone.logits(backbone.forward(rows, stacks, WholeSequences(((0, len(IDS)),), backbone.shape)))


def described(adapter: Path, **change: object) -> None:
    config = json.loads((adapter / peft.CONFIG).read_text())
    (adapter / peft.CONFIG).write_text(json.dumps({**config, **change}))


@pytest.mark.parametrize("text", TEXTS)
def test_peft_loads_what_we_save_and_computes_the_same(
    text: str, backbone: Backbone, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    graft = BoundGraft(parse(text), backbone.shape)
    values = random_tensors(graft, seed=4)
    folder = tmp_path / native.save(tmp_path, graft, values, backbone=backbone.fingerprint)
    theirs = loaded(backbone.folder, folder, torch.float32)
    assert relative(logits(backbone, graft, values), theirs(input_ids=IDS[None]).logits[0]) < 1e-5
    assert not [str(w.message) for w in recwarn if "key" in str(w.message)]  # "Found missing adapter keys"


@pytest.mark.parametrize("text", TEXTS)
def test_a_graft_comes_back_as_it_was_exported(text: str, backbone: Backbone, tmp_path: Path) -> None:
    graft = BoundGraft(parse(text), backbone.shape)
    values = random_tensors(graft, seed=4)
    peft.export(tmp_path, graft, values)
    found, tensors = peft.load(tmp_path, backbone.shape)
    assert tensors.keys() == values.keys()
    assert all(tensors[name].equal(value.float()) for name, value in values.items())
    assert [slot.op for slot in found.spec.slots] == [slot.op for slot in graft.spec.slots]
    assert logits(backbone, found, tensors).equal(logits(backbone, graft, values))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        LoraConfig(r=4, target_modules=LINEAR, use_dora=True, use_rslora=True, init_lora_weights="gaussian"),
        LoraConfig(r=2, target_modules=["v_proj"], layers_to_transform=[1], use_rslora=True, lora_dropout=0.5),
    ],
    ids=["lora", "dora", "rslora"],
)
def test_we_load_what_peft_saves_and_compute_the_same(config: LoraConfig, backbone: Backbone, tmp_path: Path) -> None:
    expected = trained(backbone.folder, config, tmp_path)(input_ids=IDS[None]).logits[0]
    assert relative(logits(backbone, *peft.load(tmp_path, backbone.shape)), expected) < 1e-5


def test_keys_and_config_are_pefts_own(backbone: Backbone, tmp_path: Path) -> None:
    graft = BoundGraft(parse("dora(r=4, alpha=6, at=attn.[qv])@1,0"), backbone.shape)
    values = random_tensors(graft, seed=1)
    peft.export(tmp_path, graft, values, base="owner/name")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: tuple(value.shape) for key, value in stored.items() if key.startswith(Q)} == {
        f"{Q}.lora_A.weight": (4, 64),
        f"{Q}.lora_B.weight": (64, 4),
        f"{Q}.lora_magnitude_vector": (64,),
    }
    assert stored[f"{Q}.lora_B.weight"].equal(values["0.0.attn.q.B"].T.float())
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "owner/name",
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": None,
        "lora_dropout": 0,
        "use_dora": True,
        "use_rslora": False,
    }


def test_no_path_of_this_machine_is_written(adapter: Path) -> None:
    assert json.loads((adapter / peft.CONFIG).read_text())["base_model_name_or_path"] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, True) for text in TEXTS),
        ("ia3", True),
        ("lora + lora(r=2)", True),
        ("pissa(r=2)@1 + lora(r=2)", True),
        ("dora(r=2, at=attn.q)@0 + dora(r=3, alpha=5, at=attn.q)@1", True),
        ("vera(r=2, at=attn.q) + lora(r=2, at=attn.v)", True),
        ("lora(at=ffn.out)", False),
        ("lora(at=attn.*|attn.out)", False),
        ("dora + bitfit", False),
        ("hira(r=2, at=attn.q) + hira(r=3, at=attn.v)", False),
        ("dora(at=attn.q) + lora(r=2, at=attn.v)", False),
        ("bitfit", False),
        ("serial", False),
        ("prefix(3)@0", False),
        ("prefix(3) + lora", False),
        ("llama-adapter(3)@0", False),
        ("ln-tuning", False),
    ],
)
def test_what_peft_has_on_whole_modules_lies_beside_the_native_files(
    text: str, expected: bool, backbone: Backbone, tmp_path: Path
) -> None:
    graft = BoundGraft(parse(text), backbone.shape)
    assert peft.exportable(graft) is expected
    values = random_tensors(graft, seed=1)
    native_folder = tmp_path / native.save(tmp_path, graft, values, backbone="stock")
    assert (native_folder / peft.WEIGHTS).exists() is (native_folder / peft.CONFIG).exists() is expected
    if not expected:
        with pytest.raises(FormatError, match=r"has no equal in PEFT|name (its|the backbone's) folder"):
            peft.export(tmp_path, graft, values)


def test_a_linear_adapter_that_is_no_lora_is_not_exported(backbone: Backbone) -> None:
    for slot in (Branch(at="attn.q", rank=2, act="relu"), Branch(at="ffn.out", rank=2, tap="output")):
        assert not peft.exportable(BoundGraft(GraftSpec("x", (slot,)), backbone.shape))


def test_tensors_that_are_not_the_grafts_are_not_exported(backbone: Backbone, tmp_path: Path) -> None:
    graft = BoundGraft(parse("lora(r=4)"), backbone.shape)
    with pytest.raises(FormatError, match="missing or unknown"):
        peft.export(tmp_path, graft, {})
    assert not list(tmp_path.iterdir())


def test_pickled_weights_are_refused(adapter: Path, backbone: Backbone) -> None:
    (adapter / peft.WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"adapter_model.bin can run code when loaded: convert it to safetensors"):
        peft.load(adapter, backbone.shape)


@pytest.mark.parametrize("name", [peft.CONFIG, peft.WEIGHTS])
def test_a_link_out_of_the_folder_is_refused(name: str, adapter: Path, backbone: Backbone, tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    for path in (adapter / peft.CONFIG, adapter / peft.WEIGHTS):
        shutil.copy(path, folder)
    (folder / name).unlink()
    (folder / name).symlink_to(adapter / name)
    with pytest.raises(FormatError, match=f"inner/{name}: is a link out of the folder"):
        peft.load(folder, backbone.shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "XLORA"}, "peft_type: 'XLORA' is not supported here; choices: .*VBLORA"),
        ({"peft_type": "IA3"}, "is not read for IA3"),
        ({"peft_type": None}, "peft_type"),
        ({"target_modules": ["lm_head"]}, "'lm_head' matches no site"),
        ({"target_modules": r".*\.(q|v)_project$"}, "matches no site"),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
        ({"target_modules": "(.|..|...)*[A-Z]"}, "matches no site"),
        ({"target_modules": r"(?!.*vision).*\.q_proj"}, "is not a regular expression that is read here"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern: .* is not an object"),
        ({"rank_pattern": {"q_proj": 2}}, r"shape \(4, 64\) is not \(2, 64\)"),
        ({"exclude_modules": ["q_proj"]}, "q_proj.* are missing or unknown"),
        ({"target_modules": ["q_proj"]}, "v_proj.* are missing or unknown"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj.* are missing or unknown"),
        ({"layers_to_transform": [0]}, "layers.1.* are missing or unknown"),
        ({"layers_to_transform": [2, 3]}, "layers: 2 is not a layer of this backbone"),
        ({"use_dora": True}, "lora_magnitude_vector.* are missing or unknown"),
        ({"r": 5}, r"shape \(4, 64\) is not \(5, 64\)"),
        ({"r": -1}, "rank: -1"),
        ({"lora_alpha": float("nan")}, "NaN is not a JSON value"),
        ({"lora_alpha": 3.5e38}, "lora.alpha: '3.5e[+]38' is out of bounds"),
        ({"r": 2**31}, "lora.r: '2147483648' is out of bounds"),
        ({"layers_pattern": json.loads("[" * 33 + "]" * 33)}, "more than 32 deep"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight: is missing"),
        ({"modules_to_save": ["o_proj"]}, "o_proj.weight: is missing"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias"),
        ({"init_lora_weights": "corda"}, "corda"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    change: dict[str, object], message: str, adapter: Path, backbone: Backbone
) -> None:
    described(adapter, **change)
    with pytest.raises(FormatError, match=message):
        peft.load(adapter, backbone.shape, BackboneFiles(backbone.folder))


def test_an_unknown_a_missing_and_a_spoiled_tensor_are_refused(adapter: Path, backbone: Backbone) -> None:
    stored = load_file(adapter / peft.WEIGHTS)
    for changed, message in (
        ({**stored, "base_model.model.lm_head.weight": torch.ones(2)}, r"lm_head.weight: shape \(2,\) is not"),
        ({key: value for key, value in stored.items() if key != f"{Q}.lora_A.weight"}, f"{Q}.lora_A.weight"),
        ({**stored, f"{Q}.lora_A.weight": stored[f"{Q}.lora_A.weight"] / 0}, "not finite"),
    ):
        save_file(changed, adapter / peft.WEIGHTS)
        with pytest.raises(FormatError, match=message):
            peft.load(adapter, backbone.shape, BackboneFiles(backbone.folder))


@pytest.mark.parametrize("name", [peft.CONFIG, peft.WEIGHTS])
def test_a_file_that_is_broken_or_not_there_is_named(name: str, adapter: Path, backbone: Backbone) -> None:
    (adapter / name).write_bytes((adapter / name).read_bytes()[:40])
    with pytest.raises(FormatError, match=adapter.name):
        peft.load(adapter, backbone.shape)
    (adapter / name).unlink()
    with pytest.raises(FormatError, match=f"holds no {name}"):
        peft.load(adapter, backbone.shape)


def test_pruned_ranks_of_adalora_are_zeros(backbone: Backbone, tmp_path: Path) -> None:
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"])
    model = get_peft_model(plain_model(backbone.folder, torch.float32), config).eval()
    keep = [True, False, True, False]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter.normal_()
                parameter[~torch.tensor(keep)] = 0
        expected = model(input_ids=IDS[None]).logits[0]
    modules = [f"model.layers.{layer}.self_attn.q_proj.lora_E" for layer in (0, 1)]
    model.peft_config["default"].rank_pattern = dict.fromkeys(modules, keep)  # type: ignore[attr-defined]
    model.save_pretrained(str(tmp_path))
    assert load_file(tmp_path / peft.WEIGHTS)[f"{Q}.lora_A"].shape == (2, 64)
    assert relative(logits(backbone, *peft.load(tmp_path, backbone.shape)), expected) < 1e-5


def test_a_union_of_linear_branches_is_one_lora(backbone: Backbone, tmp_path: Path) -> None:
    graft = BoundGraft(
        parse("pissa(r=2, alpha=3)@1 + lora(r=3, alpha=1, at=attn.*) + vera(r=2, at=attn.q)"), backbone.shape
    )
    values = random_tensors(graft, seed=4)
    peft.export(tmp_path, graft, values)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    assert config["peft_type"] == "LORA" and {config["r"], *config["rank_pattern"].values()} == {3, 4, 5, 7, 9}
    theirs = loaded(backbone.folder, tmp_path, torch.float32)
    assert relative(theirs(input_ids=IDS[None]).logits[0], logits(backbone, graft, values)) < 1e-5
