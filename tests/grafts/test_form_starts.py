"""What methods with forms start from, and what few bits can say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.lowering import Lowered
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.sites import Site
from polygraft.grafts.spec import SpecError
from polygraft.launch.demo.oracle.naive import naive, serial
from tests.grafts.oracle.row import relative
from tests.trainers.test_forms import FACTORED, GENERATED

# Those that do not start at W, or at W but for rounding, or have no start.
FROM_ELSEWHERE = ("binary-adapter", "deft", "para", "peqa", "propetl", "qalora", "snip", "sparse-adapter")
NEUTRAL = {name: text for name, text in (GENERATED | FACTORED).items() if name not in FROM_ELSEWHERE}
SITES = (Site(0, "attn.v"), Site(1, "ffn.down"))


@pytest.fixture(scope="module")
def backbone(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float32)


def started(text: str, backbone: Backbone) -> dict[str, Tensor]:
    return initialise(BoundGraft(parse(text), backbone.shape), backbone, seed=1, samples=((5, 6, 7), (8, 9)))


def change(text: str, site: Site, backbone: Backbone, values: dict[str, Tensor]) -> Tensor:
    """dW [out, in] of a graft of one slot at a site."""
    made = Lowered(BoundGraft(parse(text), backbone.shape), backbone.weight)
    operands = made.make(values)
    if f"0.{site}.t" in operands:
        return made.generator(0, site, values)(operands[f"0.{site}.t"])
    return operands[f"0.{site}.B"].T @ operands[f"0.{site}.A"]


@pytest.mark.parametrize("name", [name for name, text in NEUTRAL.items() if name not in ("vblora", "unilora")])
def test_a_graft_changes_nothing_before_it_is_trained(name: str, backbone: Backbone) -> None:
    values = started(NEUTRAL[name], backbone)
    graft = BoundGraft(parse(NEUTRAL[name]), backbone.shape)
    made = Lowered(graft, backbone.weight)
    operands = made.make(values)
    for tensor in made.operands:
        assert tensor.site is not None
        if tensor.part == "t":
            assert made.generator(0, tensor.site, values)(operands[tensor.name]).count_nonzero() == 0
        elif tensor.part == "A":
            B = operands[tensor.name.removesuffix("A") + "B"]
            assert (B.T @ operands[tensor.name]).count_nonzero() == 0


@pytest.mark.parametrize("group", [0, 16])
def test_peqa_starts_at_the_nearest_values_of_its_grid(group: int, backbone: Backbone) -> None:
    text = f"peqa(bits=4, group={group})"
    values = started(text, backbone)
    for site in SITES:
        W, step = backbone.weight(site), values[f"0.{site}.s"]
        rounded = (W + change(text, site, backbone, values)).view(*step.shape, -1)
        assert ((rounded - W.view_as(rounded)).abs() <= step.unsqueeze(2) * (0.5 + 1e-4)).all()
        assert max(len(row.unique()) for row in rounded.flatten(0, 1)) <= 16


def test_a_sparse_adapter_keeps_its_largest_values_or_any(backbone: Backbone) -> None:
    values = started("sparse-adapter(12, density=0.25)", backbone)
    weights, masks = (
        torch.cat([value.flatten() for name, value in values.items() if (".mask_" in name) == masked])
        for masked in (False, True)
    )
    assert masks.mean() == pytest.approx(0.25, abs=1e-3)
    assert weights[masks == 1].abs().min() >= weights[masks == 0].abs().max()
    by_chance = started("sparse-adapter(12, density=0.25, by=random)", backbone)
    kept = torch.cat([value.flatten() for name, value in by_chance.items() if ".mask_" in name])
    assert set(kept.tolist()) == {0.0, 1.0} and kept.mean() == pytest.approx(0.25, abs=0.05)


def test_snip_keeps_what_the_loss_would_miss_most(tiny_folder: Path) -> None:
    """The largest |w dL/dw| at the start (Lee et al. 2019, eq. 5), with the gradients of the naive adapter."""
    backbone, samples = Backbone.load(tiny_folder, torch.float64), ((5, 6, 7), (8, 9))
    graft = BoundGraft(parse("sparse-adapter(6, density=0.25, by=snip)"), backbone.shape)
    values = initialise(graft, backbone, seed=1, samples=samples)
    weights = {name: value for name, value in values.items() if ".mask_" not in name}
    oracle = naive(tiny_folder, {0: serial()}, weights, torch.float64)
    loss = sum(
        F.cross_entropy(oracle.logits(torch.tensor(ids[:-1])), torch.tensor(ids[1:]), reduction="sum")
        for ids in samples
    )
    (loss / 3).backward()  # type: ignore[union-attr]
    scores = {name: (weights[name] * slope).abs() for name, slope in oracle.gradients().items()}
    limit = torch.cat([score.flatten() for score in scores.values()]).quantile(0.75)
    for name, score in scores.items():
        *site, part = name.split(".")
        assert torch.equal(values[".".join([*site, f"mask_{part}"])] == 1, score >= limit), name


def test_tinylora_stands_on_the_largest_singular_directions(backbone: Backbone) -> None:
    values = started("tinylora(r=3)", backbone)
    for site in SITES:
        U, S, Vh = torch.linalg.svd(backbone.weight(site).double(), full_matrices=False)
        best = U[:, :3] * S[:3] @ Vh[:3]
        assert relative(values[f"0.{site}.B"].T @ values[f"0.{site}.A"], best) < 1e-5


@pytest.mark.parametrize("by", ["relu", "qr"])
def test_deft_puts_back_what_it_takes_away(by: str, backbone: Backbone) -> None:
    text = f"deft(r=4, scale=2, by={by})"
    values = started(text, backbone)
    for site in SITES:
        taken = change(text, site, backbone, {n: 0 * v if n.endswith("R") else v for n, v in values.items()})
        assert taken.norm() > 0 and change(text, site, backbone, values).norm() < 1e-5 * taken.norm()


def test_delora_is_bounded_by_its_strength(backbone: Backbone) -> None:
    """|dW / w| <= l in spectral norm, whatever A and B are (Bini et al. 2025)."""
    text = "delora(r=4, bound=2)"
    values = {n: v + torch.randn(v.shape) if n[-1] in "AB" else v for n, v in started(text, backbone).items()}
    for site in SITES:
        directions = change(text, site, backbone, values) / backbone.weight(site).norm(dim=0)
        assert 0 < torch.linalg.matrix_norm(directions, 2) <= 2 * (1 + 1e-5)


def test_unilora_uses_every_element_of_its_vector_alike(backbone: Backbone) -> None:
    values = started("unilora(r=3, d=50)", backbone)
    used = torch.cat([value.flatten() for name, value in values.items() if ".index_" in name]).long().bincount()
    assert len(used) == 50 and used.max() - used.min() <= 1
    assert torch.allclose(values["0.shared.scale"], used.float().rsqrt())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vblora(length=48)", "48 does not divide the width 64"),
        ("vblora(vectors=4, k=5)", "5 of 4 vectors"),
        ("c3a(block=5)", "5 does not divide"),
        ("fourierft(n=1000000)", "1000000 coefficients"),
        ("miss(r=80)", "80 is more than the 64 inputs"),
        ("gralora(r=4, k=3)", "3 does not divide the rank 4"),
        ("qalora(group=7)", "7 does not divide the 64 inputs"),
        ("peqa(bits=1)", "1 is not 2 to 8"),
        ("compacter(6, n=4)", "4 does not divide the size 6"),
        ("sparse-adapter(4, by=luck)", "'luck' is not a criterion"),
        ("capaboost(density=0)", "outside"),
        ("tinylora(r=40, at=attn.k)", "more than the 32 ranks"),
        ("bdlora(r=6, blocks=4)", "4 does not divide the rank 6"),
        ("hypernet-adapter(code=0)", "code 0 are sizes"),
        ("deft(by=luck)", "'luck' is not a projection"),
        ("glora(kind=scalar)", "'scalar' is not a support"),
        ("psoft(r=1)", "cannot be turned"),
        ("delora(at=ffn.out)", "no weight matrix"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, message: str, backbone: Backbone) -> None:
    with pytest.raises(SpecError, match=message):
        started(text, backbone)
