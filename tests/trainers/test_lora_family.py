"""The methods that change how LoRA is trained: their hooks against PEFT's or the paper's, and packed equal to alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.slab import Slab
from polygraft.grafts.sites import Site
from polygraft.launch.demo.oracle.naive import lora, naive
from polygraft.launch.demo.oracle.peft_oracle import peft_oracle
from polygraft.launch.demo.oracle.plain import Oracle, Place
from polygraft.trainers.hooks import Hooks
from polygraft.trainers.job import TrainConfig, TrainJob
from polygraft.trainers.lanes import gradient
from tests.grafts.oracle import family_lora
from tests.grafts.oracle.row import relative
from tests.trainers.solo import trained
from tests.trainers.test_packed_equals_alone import a_job, assert_as_alone, jobs_of, pack_of, run

TARGETS = ["q_proj", "v_proj"]
AT = "at=attn.[qv]"
FAMILY = {
    "pissa": f"pissa(r=4, {AT})",
    "milora": f"milora(r=4, {AT})",
    "olora": f"olora(r=4, {AT})",
    "mica": f"mica(r=4, {AT}, dropout=0.1)",
    "eva": f"eva(r=4, {AT})",
    "corda": f"corda(r=4, {AT})",
    "lora-ga": f"lora-ga(r=4, {AT})",
    "orthogonal": f"orthogonal(r=4, {AT})",
    "lora-fa": f"lora-fa(r=4, {AT}, correct=1)",
    "lora-plus": f"lora-plus(r=4, {AT})",
    "moslora": f"moslora(r=4, {AT})",
    "lora-xs": f"lora-xs(r=4, {AT})",
    "adalora": f"adalora(r=4, target=2, every=2, {AT})",
    "sora": f"sora(r=4, {AT}, threshold=0.01)",
    "dylora": f"dylora(r=6, {AT})",
    "lora-dropout": f"lora-dropout(r=4, {AT}, p=0.3)",
    "lora": f"lora(r=4, {AT})",
}


def ours(job: TrainJob, backbone: Backbone) -> dict[str, Tensor]:
    """All tensors of the job after its last step, by name."""
    pack = pack_of(backbone, [job])
    while not pack.jobs[job.id].finished:
        assert not pack.step().failed
    return {name: value.clone() for name, value in pack.jobs[job.id].slab.tensors.items()}


def start_of(job: TrainJob, backbone: Backbone) -> dict[str, Tensor]:
    return initialise(job.graft, backbone, seed=job.config.seed, samples=[sample.ids for sample in job.train])


@pytest.mark.parametrize("texts", [FAMILY], ids=["all"])
@pytest.mark.equality("packed")
def test_steps_in_company_leave_the_bits_of_as_many_alone(texts: dict[str, str], steps: int, folder: Path) -> None:
    backbone = Backbone.load(folder, torch.float32, training=True)
    jobs = jobs_of(steps, texts)
    assert_as_alone(run(pack_of(backbone, jobs)), jobs, backbone)


@pytest.mark.parametrize("ratio", [16.0, 4.0])
def test_lora_plus_is_pefts_lora_with_a_faster_b(ratio: float, fp64: Backbone) -> None:
    """Hayou et al. 2024: eta_B = ratio eta_A."""
    job = a_job("plus", f"lora-plus(r=4, alpha=8, {AT}, ratio={ratio})", seed=3, steps=12)
    oracle = peft_oracle(
        fp64.folder, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), start_of(job, fp64), torch.float64
    )
    expected = trained(oracle, job, rate=lambda part: ratio if part == "B" else 1.0)
    assert_trained(ours(job, fp64), expected)


def test_lora_fas_correction_is_the_gradient_nearest_to_the_full_one(fp64: Backbone) -> None:
    """Least squares: of all dB, the one whose s^2 A^T (A dB) is nearest to the full gradient's part in A's rows."""
    job = a_job("fa", f"lora-fa(r=4, alpha=8, {AT}, correct=1)", seed=1, steps=1)
    running = pack_of(fp64, [job]).jobs["fa"]
    site, generator = Site(0, "attn.q"), torch.Generator().manual_seed(0)
    A = running.slab.frozen[f"0.{site}.A"]
    full = torch.randn(A.shape[1], 64, generator=generator, dtype=torch.float64)  # dL/dW^T [in, out]
    raw = {name: torch.zeros_like(value).view(-1) for name, value in running.slab.views.items()}
    raw[f"0.{site}.B"] = (2.0 * A @ full).view(-1)
    running.slab.collect(running.slab.joined(list(raw.values())))
    Hooks(job.graft, running.slab).before_step()
    expected = torch.linalg.lstsq(2.0 * A.T, full).solution
    assert relative(running.slab.gradients()[f"0.{site}.B"], expected) < 1e-9


def test_adalora_is_trained_and_pruned_as_by_peft(fp64: Backbone) -> None:
    job = a_job("ada", f"adalora(r=4, alpha=8, target=2, every=2, warmup=0.2, final=0.2, {AT})", seed=2, steps=20)
    total = job.steps_total
    config = AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, total_step=total, target_modules=TARGETS, orth_reg_weight=0.5,
        tinit=int(0.2 * total), tfinal=int(0.2 * total), deltaT=2, beta1=0.85, beta2=0.85,
    )  # fmt: skip
    models: list[PeftModel] = []

    def place(model: PeftModel, name: str, value: Tensor) -> Place:
        models.append(model)
        return family_lora.adalora(model, name, value)

    oracle = peft_oracle(fp64.folder, config, start_of(job, fp64), torch.float64, place)
    model, ids = models[0], torch.tensor([[1, 2, 3]])
    allocator = RankAllocator(model, config, "default")

    def penalty() -> Tensor:
        """What PEFT's forward adds to a loss."""
        bare = model.base_model.model(input_ids=ids, labels=ids).loss  # type: ignore[operator]
        penalised = model.base_model(input_ids=ids, labels=ids).loss
        return penalised - bare

    expected = trained(oracle, job, penalty=penalty, after_step=lambda step: allocator.update_and_allocate(model, step))
    found = ours(job, fp64)
    assert_trained(found, expected)
    alive = sum(int(value.count_nonzero()) for name, value in found.items() if name.endswith(".E"))
    sites = sum(name.endswith(".E") for name in found)
    assert alive == 2 * sites


def test_adaloras_penalty_of_squares_is_the_papers(fp64: Backbone) -> None:
    """Zhang et al. 2023, eq. 4: R(P, Q) = |P^T P - I|_F^2 + |Q Q^T - I|_F^2, its sum over all matrices times gamma."""
    text = f"adalora(r=4, alpha=8, target=4, orthogonal=0.01, penalty=squares, {AT})"
    job = a_job("squares", text, seed=2, steps=12)
    scale = 8 / (4 + 1e-5)
    found = naive(fp64.folder, {0: family_lora.triplets(scale)}, start_of(job, fp64), torch.float64)
    oracle = Oracle(
        found.logits, {name: place for name, place in found.places.items() if name[-2:] in (".A", ".E", ".B")}
    )
    factors = [place.parameter for name, place in oracle.places.items() if name.endswith((".A", ".B"))]

    def penalty() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for rows in factors:  # Q, and P transposed
            for i, row in enumerate(rows):
                for j, other in enumerate(rows):
                    total = total + (torch.dot(row, other) - float(i == j)) ** 2
        return 0.01 * total

    assert_trained(ours(job, fp64), trained(oracle, job, penalty=penalty))


def test_soras_gate_takes_a_proximal_step_after_each_of_the_optimisers(fp64: Backbone) -> None:
    """Ding et al. 2023, section 3: T(x) = x - xi above xi, x + xi below -xi, 0 between."""
    job = a_job("sora", f"sora(r=4, alpha=8, {AT}, threshold=0.05)", seed=1, steps=15)
    oracle = naive(fp64.folder, {0: family_lora.gated(2.0)}, start_of(job, fp64), torch.float64)

    def proximal(step: int) -> None:
        for name, found in oracle.places.items():
            if name.endswith(".keep"):
                g, xi = found.parameter.data, 0.05
                found.parameter.data = torch.where(g > xi, g - xi, torch.where(g < -xi, g + xi, 0.0))

    expected = trained(oracle, job, after_step=proximal)
    found = ours(job, fp64)
    assert_trained(found, expected)
    gates = torch.cat([value for name, value in found.items() if name.endswith(".keep")])
    assert 0 < gates.count_nonzero() < len(gates)


def test_dylora_trains_a_random_number_of_first_ranks_a_step(fp64: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step's gradient is that of the first b ranks at the scale alpha / b, and over the steps all b come up."""
    job, seen = a_job("dylora", f"dylora(r=4, alpha=8, {AT})", seed=2, steps=12), set()
    for step, (before, gradients) in enumerate(recorded(job, fp64, monkeypatch)):
        used = {int(g.any(1).sum()) for name, g in gradients.items() if name.endswith(".B")}
        assert len(used) == 1
        rank = used.pop()
        seen.add(rank)
        oracle = naive(fp64.folder, {0: family_lora.nested(8.0, rank)}, before, torch.float64)
        for name, expected in loss_gradients(oracle, job, step).items():
            assert (gradients[name] - expected).norm() <= 1e-9 * expected.norm(), name
    assert seen == {1, 2, 3, 4}


def test_lora_dropout_drops_columns_of_a_and_rows_of_b(fp64: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lin et al. 2024: y = W x + s (m_B * B) (A * m_A) x, the same masks in a whole step, new ones in the
    next."""
    job, masks = a_job("dropped", f"lora-dropout(r=4, alpha=8, {AT}, p=0.25)", seed=2, steps=6), []
    for step, (before, gradients) in enumerate(recorded(job, fp64, monkeypatch)):
        kept = {name: g.any(0) for name, g in gradients.items()}
        if not all(found.any() for found in kept.values()):  # B is 0 in the first step, and A has no gradient
            continue
        masks.append(torch.cat([*kept.values()]))
        masked = {name: value * kept[name] / 0.75 for name, value in before.items()}
        oracle = naive(fp64.folder, {0: lora(2.0)}, masked, torch.float64)
        for name, expected in loss_gradients(oracle, job, step).items():
            assert relative(gradients[name], expected * kept[name] / 0.75) < 1e-9, name
    assert len(masks) >= 5 and not any(torch.equal(a, b) for a, b in pairwise(masks))
    assert 0.65 < float(torch.cat(masks).double().mean()) < 0.85


def recorded(
    job: TrainJob, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The job's tensors before each optimiser step, and the gradients that the step takes."""
    found: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    real = gradient.adamw  # type: ignore[attr-defined]

    def noting(slab: Slab, config: TrainConfig, **options: Any) -> None:
        values, gradients = slab.tensors, slab.gradients()
        found.append(({n: v.clone() for n, v in values.items()}, {n: g.clone() for n, g in gradients.items()}))
        real(slab, config, **options)

    with monkeypatch.context() as patch:
        patch.setattr(gradient, "adamw", noting)
        ours(job, backbone)
    return found


def loss_gradients(oracle: Oracle, job: TrainJob, step: int) -> dict[str, Tensor]:
    """Gradients of the loss of global batch `step`."""
    for number in job.batch(step):
        sample = job.train[number]
        losses = F.cross_entropy(
            oracle.logits(torch.tensor(sample.ids[:-1])), torch.tensor(sample.ids[1:]), reduction="none"
        )
        ((losses * torch.tensor(sample.weights[1:])).sum() / job.batch_weight(step)).backward()
    return oracle.gradients()


def assert_trained(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert expected
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-6 * value.norm(), name
