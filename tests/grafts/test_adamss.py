"""AdaMSS against PEFT's own layers, given the clusters that scikit-learn would find, and what it starts from."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import AdamssConfig, PeftModel
from peft.tuners.adamss import layer as layers
from torch import Tensor, nn

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import peft
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.methods.configs import check
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.spec import SpecError
from polygraft.launch.demo.oracle.peft_oracle import peft_oracle
from polygraft.launch.demo.oracle.plain import Place, split
from tests.grafts.oracle.family_pefts import ROWS
from tests.grafts.oracle.peft_places import layer_of
from tests.grafts.oracle.row import relative
from tests.grafts.test_methods import batch, judged, ours

CLUSTERS = 3


class Slices(nn.Module):
    """PEFT's list of a tensor's parts, as rows of one parameter."""

    def __init__(self, whole: Tensor, parts: Sequence[int | Tensor]) -> None:
        super().__init__()
        self.whole, self.parts = nn.Parameter(whole), parts

    def __getitem__(self, index: int) -> Tensor:
        return self.whole[self.parts[index]]


def place(model: PeftModel, name: str, value: Tensor) -> Place:
    part, layer = split(name)[3], layer_of(model, name)
    match part:
        case "N":
            return Place(layer.adamss_newB["default"])
        case "cluster":
            return Place(torch.empty_like(value))  # those of the test
        case "A":
            layer.adamss_A["default"] = Slices(torch.empty_like(value), range(CLUSTERS))  # type: ignore[assignment]
        case "B":
            layer.adamss_B["default"] = Slices(torch.empty_like(value), [*layer.seg_result["default"].values()])  # type: ignore[assignment]
    return Place(getattr(layer, f"adamss_{part}")["default"].whole)


def test_logits_and_gradients_are_those_of_pefts_layers(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setattr(layers, "clustering_Z", lambda rows, count, rounds: (torch.arange(len(rows)) % count, count))
    targets = ["q_proj", "v_proj", "down_proj"]
    config = AdamssConfig(r=12, num_subspaces=CLUSTERS, subspace_rank=2, target_modules=targets)
    row, fp64 = ROWS["adamss"], Backbone.load(tiny_folder, torch.float64)
    values, (prompts, slopes) = row.values(fp64.shape, seed=3), batch(fp64)
    expected, wanted = judged(peft_oracle(tiny_folder, config, values, torch.float64, place), prompts, slopes)
    logits, gradients = ours([(row, values)], fp64, prompts, slopes)
    assert relative(logits, expected) < 1e-9 and gradients.keys() == wanted.keys()
    assert all(relative(gradients[name], value) < 1e-9 for name, value in wanted.items())


def test_it_starts_from_the_directions_of_w_and_of_the_clusters_of_its_rows(tiny_folder: Path) -> None:
    backbone = Backbone.load(tiny_folder, torch.float32)
    graft = BoundGraft(parse("adamss(r=12, subspaces=4, rank=2)"), backbone.shape)
    values = initialise(graft, backbone, seed=1, samples=())
    for site in {name.removeprefix("0.").rpartition(".")[0] for name in values}:
        N, cluster, A, B = (values[f"0.{site}.{part}"] for part in ("N", "cluster", "A", "B"))
        layer, name = site.split(".", 1)
        W = next(backbone.weight(s) for s in backbone.linears if (s.layer, s.name) == (int(layer), name)).float()
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        assert relative(N, Vh[:12]) < 1e-5 and B.count_nonzero() == 0
        assert set(cluster.tolist()) == {0, 1, 2, 3}
        anyhow = cluster[torch.randperm(len(cluster), generator=torch.Generator().manual_seed(0))]
        assert scatter(U[:, :12], cluster) < 0.95 * scatter(U[:, :12], anyhow)
        for k in range(4):
            rows = U[cluster == k, :12]
            best = torch.linalg.svdvals(rows)[:2].square().sum()
            assert abs((rows @ A[k].T).square().sum() - best) < 1e-4 * best, "no two directions hold more of the rows"


def scatter(rows: Tensor, cluster: Tensor) -> float:
    """Squared distances of rows to the means of their clusters."""
    found = [rows[cluster == k] for k in cluster.unique()]
    return float(sum((own - own.mean(0)).square().sum() for own in found))


def test_pruning_on_the_way_is_refused() -> None:
    with pytest.raises(SpecError, match="use_asa: True is not read"):
        check({"peft_type": "ADAMSS", "use_asa": True, "target_modules": ["q_proj"]})


def test_a_folder_of_pefts_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ADAMSS", "target_modules": ["q_proj"]}')
    with pytest.raises(FormatError, match="'ADAMSS' is not supported here; choices: ADALORA, ADAPTION_PROMPT"):
        peft.load(tmp_path, Backbone.load(tiny_folder, torch.float32).shape)
