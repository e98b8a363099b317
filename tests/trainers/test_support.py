"""Methods that find out what to train: their masks and hooks against the papers', and packed equal to alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.methods.declare import SiteShape
from polygraft.grafts.methods.selective.support import uniform
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.sites import Site
from polygraft.launch.demo.oracle.naive import Hook, Parts, naive
from polygraft.launch.demo.oracle.plain import MODULES, Oracle, plain_llama, split
from polygraft.trainers.job import TrainJob
from tests.grafts.oracle.family_sparse import sparse_update
from tests.grafts.oracle.family_support import changed, hard_concrete, shifted
from tests.trainers.solo import trained
from tests.trainers.test_lora_family import assert_trained, loss_gradients, ours, recorded
from tests.trainers.test_packed_equals_alone import a_job, assert_as_alone, jobs_of, pack_of, run

pytestmark = pytest.mark.usefixtures("one_thread")

AT = "at=attn.[qv]"
FAMILY = {
    "fishmask": "fishmask(density=0.02, room=3)",
    "moving-mask": f"moving-mask(density=0.01, every=3, {AT})",
    "moved-rows": "moved-rows(density=0.2)",
    "lora": "lora(r=2)",
    "spt": "spt(r=2, density=0.04)",
    "lt-sft": f"lt-sft(density=0.1, {AT})",
    "diff-pruning": f"diff-pruning(density=0.1, relax=0.5, penalty=0.001, {AT})",
    "diff groups": f"diff-pruning(density=0.1, relax=0.5, penalty=0.001, structured=1, {AT})",
    "child-tuning": f"child-tuning(p=0.4, {AT})",
    "s-bitfit": "s-bitfit(density=0.5)",
}
SAMPLES = ((5, 6, 7, 8, 300, 21), (9, 10, 11), (400, 3, 3, 17, 90))


@pytest.mark.parametrize("texts", [FAMILY], ids=["all"])
@pytest.mark.equality("packed")
def test_steps_in_company_leave_the_bits_of_as_many_alone(texts: dict[str, str], steps: int, folder: Path) -> None:
    backbone = Backbone.load(folder, torch.float32, training=True)
    jobs = jobs_of(steps, texts)
    assert_as_alone(run(pack_of(backbone, jobs)), jobs, backbone)


def test_fishmask_takes_the_entries_of_the_largest_empirical_fisher_information(fp64: Backbone) -> None:
    """Sung et al. 2021, section 3: F = mean over the samples of the squared gradient of log p(y | x), and the mask are
    the k parameters of the whole model for which it is largest."""
    fisher = {site: torch.stack(g).square().sum(0) for site, g in sample_gradients(fp64).items()}
    values = initialise(BoundGraft(parse("fishmask(density=0.02, room=50)"), fp64.shape), fp64, seed=0, samples=SAMPLES)
    masks = [learning(values, site, found) for site, found in fisher.items()]
    everything, mask = (torch.cat([one.flatten() for one in found]) for found in (fisher.values(), masks))
    assert int(mask.sum()) == int(0.02 * len(everything))
    assert everything[mask].min() >= everything[~mask].max()
    shares = [float(one.double().mean()) for one in masks]
    assert min(shares) < 0.01 < 0.04 < max(shares)  # which is not the same share of every matrix


def test_a_matrix_of_fishmask_has_no_more_than_its_room(fp64: Backbone) -> None:
    fisher = {site: torch.stack(g).square().sum(0) for site, g in sample_gradients(fp64).items()}
    values = initialise(BoundGraft(parse("fishmask(density=0.02, room=2)"), fp64.shape), fp64, seed=0, samples=SAMPLES)
    masks = {site: learning(values, site, found) for site, found in fisher.items()}
    assert sum(int(mask.sum()) for mask in masks.values()) == int(0.02 * sum(f.numel() for f in fisher.values()))
    rooms = {site: int(0.04 * found.numel()) for site, found in fisher.items()}
    full = [site for site, mask in masks.items() if int(mask.sum()) == rooms[site]]
    assert full and all(int(mask.sum()) <= rooms[site] for site, mask in masks.items())
    least = min(fisher[site][mask].min() for site, mask in masks.items() if mask.any())
    for site, mask in masks.items():
        assert fisher[site][~mask].max() <= (fisher[site][mask].min() if site in full else least)


def learning(values: Mapping[str, Tensor], site: Site, like: Tensor) -> Tensor:
    """Which entries of a matrix learn."""
    places = values[f"0.{site}.i"][values[f"0.{site}.chosen"][:, 0] == 1].long()
    mask = torch.zeros_like(like, dtype=torch.bool)
    mask[tuple(places.T)] = True
    assert int(mask.sum()) == len(places)
    return mask


def test_moved_rows_are_those_that_a_first_step_moves_most(fp64: Backbone) -> None:
    values = initialise(BoundGraft(parse("moved-rows(density=0.2)"), fp64.shape), fp64, seed=0, samples=SAMPLES)
    for site, found in sample_gradients(fp64).items():
        if site.name in ("ffn.gate", "ffn.up"):
            moved = torch.stack(found).sum(0).abs().sum(1)
            assert set(values[f"0.{site}.i"][:, 0].tolist()) == set(moved.topk(19).indices.tolist())


def test_spt_shares_sensitive_entries_out_over_all_matrices(fp64: Backbone) -> None:
    """He et al. 2023, section 3: top tau of all entries; a LoRA where a matrix has enough of them, else they alone."""
    fisher = {site: torch.stack(g).square().sum(0) for site, g in sample_gradients(fp64).items()}
    everything = torch.cat([f.flatten() for f in fisher.values()])
    limit = everything.sort(descending=True).values[int(0.04 * len(everything)) - 1]
    values = initialise(BoundGraft(parse("spt(r=2, density=0.04)"), fp64.shape), fp64, seed=0, samples=SAMPLES)
    chosen = []
    for site, found in fisher.items():
        sensitive = found >= limit
        d_out, d_in = found.shape
        low_rank = int(sensitive.sum()) >= 2 * (d_in + d_out)
        chosen.append(low_rank)
        assert bool(values[f"0.{site}.chosen"]) == low_rank
        marked = values[f"1.{site}.i"].long()[values[f"1.{site}.sensitive"][:, 0] == 1]
        assert {tuple(p) for p in marked.tolist()} == (
            set() if low_rank else {tuple(p) for p in sensitive.nonzero().tolist()}
        )
    assert any(chosen) and not all(chosen)


def test_the_moving_mask_goes_to_the_largest_squared_gradients(fp64: Backbone) -> None:
    job = a_job("dip", FAMILY["moving-mask"], seed=1, steps=14)
    start = start_of(job, fp64)
    oracle = of(job, fp64, start, {0: sparse_update()})
    masks = {name: start[name.replace(".w", ".dip_on")][:, 0] == 1 for name in oracle.places}
    seen = {name: torch.zeros_like(start[name]) for name in oracle.places}
    moved = []

    def gradient() -> None:
        for name, place in oracle.places.items():
            assert place.parameter.grad is not None
            seen[name] += place.parameter.grad**2
            place.parameter.grad[~masks[name]] = 0

    def after_step(step: int) -> None:
        for name in oracle.places if step % 3 == 2 else ():
            order = seen[name][:, 0].argsort(descending=True)[: int(masks[name].sum())]
            mask = torch.isin(torch.arange(len(masks[name])), order)
            moved.append(not torch.equal(mask, masks[name]))
            masks[name], seen[name] = mask, torch.zeros_like(seen[name])

    assert_trained(ours(job, fp64), trained(oracle, job, gradient=gradient, after_step=after_step))
    assert any(moved) and all(0 < mask.sum() < len(mask) for mask in masks.values())


def test_lt_sft_rewinds_and_trains_what_changed_most(fp64: Backbone) -> None:
    """Ansell et al. 2022, section 3.1: mu_i = 1 for the K largest |theta^(1)_i - theta^(0)_i|, then from theta^(0), by
    another optimiser with another schedule as in the authors' code."""
    job = a_job("lt", FAMILY["lt-sft"], seed=2, steps=12)
    masks: dict[int, Tensor] = {}
    oracle = of(job, fp64, start_of(job, fp64), {0: changed(lambda p: masks.get(id(p["change"]), 1) * p["change"])})

    def after_step(step: int) -> None:
        if step + 1 == job.steps_total // 2:
            leaves = [place.parameter for place in oracle.places.values()]
            limit = largest(leaves, 0.1)
            for leaf in leaves:
                masks[id(leaf)] = (leaf.detach().abs() >= limit).double()
                leaf.data.zero_()

    found = ours(job, fp64)
    assert_trained(found, trained(oracle, job, after_step=after_step, anew=job.steps_total // 2))
    stays = torch.cat([v.flatten() for n, v in found.items() if n.endswith(".stays")])
    assert int(stays.sum()) == int(0.1 * len(stays))


def test_a_penalty_closes_a_matrix_as_a_whole(fp64: Backbone) -> None:
    """With a gate for every matrix its expected count is a product, which a penalty lowers by that gate, too."""

    def groups(penalty: float) -> Tensor:
        text = f"diff-pruning(density=0.1, relax=0.9, penalty={penalty}, structured=1, {AT})"
        pack = pack_of(fp64, [a_job("groups", text, seed=2, steps=12)])
        values = pack.jobs["groups"].slab.tensors
        run(pack)
        return torch.cat([value for name, value in values.items() if name.endswith("diff_group")])

    assert (groups(0.1) < groups(0.0) - 0.01).all()


def test_diff_pruning_trains_gates_and_then_what_is_left(fp64: Backbone) -> None:
    """Guo et al. 2021, section 3: L(theta + z * w) + lambda sum sigma(a - log(-l / r)), then magnitude pruning, 3.2."""
    job = a_job("diff", FAMILY["diff-pruning"], seed=2, steps=12)
    u: dict[int, Tensor] = {}
    kept: dict[int, Tensor] = {}

    def change(p: Parts) -> Tensor:
        leaf = id(p["diff_gate"])
        return kept[leaf] * p["diff"] if leaf in kept else hard_concrete(p["diff_gate"], u[leaf]) * p["diff"]

    oracle = of(job, fp64, start_of(job, fp64), {0: changed(change)})
    gates = {name: place.parameter for name, place in oracle.places.items() if name.endswith("diff_gate")}
    diffs = {name: oracle.places[name.removesuffix("_gate")].parameter for name in gates}

    def draw(step: int) -> None:
        for name, gate in gates.items():
            _, layer, site, _ = split(name)
            u[id(gate)] = uniform(job.key(step), SiteShape(layer, site, *gate.shape[::-1]), gate.detach())

    def penalty() -> Tensor:
        return 0.001 * sum((gate.sigmoid().sum() for gate in gates.values()), torch.zeros(())) * (not kept)

    def after_step(step: int) -> None:
        draw(step + 1)
        if step + 1 == job.steps_total // 2:
            for name, diff in diffs.items():
                diff.data *= hard_concrete(gates[name].detach())
            limit = largest(list(diffs.values()), 0.1)
            kept.update({id(gates[name]): (d.detach().abs() >= limit).double() for name, d in diffs.items()})

    draw(0)
    found = ours(job, fp64)
    assert_trained(found, trained(oracle, job, penalty=penalty, after_step=after_step))
    left = torch.cat([v.flatten() for n, v in found.items() if n.endswith("diff_kept")])
    assert int(left.sum()) == int(0.1 * len(left))


def test_child_tuning_keeps_a_new_random_part_of_every_gradient(
    fp64: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Xu et al. 2021, section 2: g * M / p with M Bernoulli(p), drawn in every step."""
    job, masks = a_job("child", FAMILY["child-tuning"], seed=2, steps=6), []
    for step, (before, gradients) in enumerate(recorded(job, fp64, monkeypatch)):
        oracle = of(job, fp64, before, {0: changed(lambda p: p["child"])})
        expected = loss_gradients(oracle, job, step)
        for name, found in gradients.items():
            assert (found - torch.where(found != 0, expected[name] / 0.4, 0)).norm() <= 1e-9 * found.norm()
        masks.append(torch.cat([g.flatten() != 0 for g in gradients.values()]))
    assert all(0.36 < float(mask.double().mean()) < 0.44 for mask in masks)
    assert all(0.1 < float((a & b).double().mean()) < 0.22 for a, b in pairwise(masks))


def test_s_bitfit_keeps_the_biases_that_the_loss_would_miss(fp64: Backbone) -> None:
    """Lawton et al. 2023, section 3: structured pruning by the summed first-order change -theta . dL/dtheta."""
    job = a_job("bias", FAMILY["s-bitfit"], seed=2, steps=20)
    stays: dict[int, float] = {}
    oracle = of(job, fp64, start_of(job, fp64), {0: shifted(lambda p: stays.get(id(p["b"]), 1.0) * p["b"])})
    leaves = [place.parameter for place in oracle.places.values()]
    rise = dict.fromkeys(map(id, leaves), 0.0)

    def after_step(step: int) -> None:
        for leaf in leaves if step < int(0.3 * job.steps_total) else ():
            assert leaf.grad is not None
            rise[id(leaf)] -= float(leaf.detach() @ leaf.grad)
        if step + 1 == int(0.3 * job.steps_total):
            limit = sorted(rise.values(), reverse=True)[len(rise) // 2 - 1]
            stays.update({key: float(value >= limit) for key, value in rise.items()})
            for leaf in leaves:
                leaf.data.zero_()

    found = ours(job, fp64)
    assert_trained(found, trained(oracle, job, after_step=after_step, anew=int(0.3 * job.steps_total)))
    assert sum(float(v) for n, v in found.items() if n.endswith("bias_stays")) == len(leaves) // 2


def start_of(job: TrainJob, backbone: Backbone) -> dict[str, Tensor]:
    """What the job starts from in a pack."""
    slab = pack_of(backbone, [job]).jobs[job.id].slab
    return {name: value.clone() for name, value in slab.tensors.items()}


def of(job: TrainJob, backbone: Backbone, start: Mapping[str, Tensor], hooks: Mapping[int, Hook]) -> Oracle:
    """The oracle whose leaves are the trained tensors only."""
    found = naive(backbone.folder, hooks, start, torch.float64)
    kept = {t.name for t in job.graft.tensors if t.trained}
    return Oracle(found.logits, {name: place for name, place in found.places.items() if name in kept})


def largest(leaves: list[Tensor], share: float) -> Tensor:
    """The smallest among the largest `share` of absolute values."""
    flat = torch.cat([leaf.detach().abs().flatten() for leaf in leaves]).sort(descending=True).values
    return flat[int(share * len(flat)) - 1]


def sample_gradients(backbone: Backbone) -> dict[Site, list[Tensor]]:
    """Of every sample, the gradient of its loss in every projection's weight, by autograd on the plain model."""
    model = plain_llama(backbone.folder, torch.float64)
    sites = list(backbone.linears)
    weights = [model.model.layers[s.layer].get_submodule(MODULES[s.name]).weight.requires_grad_() for s in sites]
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for ids in SAMPLES:
        logits = model(torch.tensor(ids[:-1])[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        for site, gradient in zip(sites, torch.autograd.grad(loss, weights), strict=True):
            found[site].append(gradient)
    return found
