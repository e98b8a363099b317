"""Methods that PEFT 0.21 brought: trained as PEFT trains them with the same random numbers, and packed equal to
alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.poly.router import PolyRouter
from peft.tuners.pvera import PveraLayer
from torch import Tensor

from polygraft.grafts.init import initialise
from polygraft.grafts.merge import Fold
from polygraft.grafts.methods import declare
from polygraft.grafts.methods.selective.support import uniform
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.keys import NoisyKey
from polygraft.grafts.runtime.rows import dropout_keys
from polygraft.grafts.runtime.streams import stream
from polygraft.grafts.sites import Site
from polygraft.kernels.common.noise import normal_rows
from polygraft.launch.demo.oracle.peft_oracle import Find, peft_oracle
from polygraft.launch.demo.oracle.plain import MODULES, Oracle, Place, plain_llama
from polygraft.trainers.job import TrainJob
from tests.grafts.oracle.family_pefts import ROWS
from tests.grafts.oracle.row import relative
from tests.trainers.solo import trained
from tests.trainers.test_lora_family import assert_trained, ours, start_of
from tests.trainers.test_packed_equals_alone import a_job, assert_as_alone, jobs_of, pack_of, run

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILY = {
    "pvera": "pvera(r=6)",
    "poly": "poly(r=2, skills=3, splits=2, at=attn.[qv])",
    "cpt": "cpt(ids=5|17|300|42|8, types=1|2|2|3|4)",
    "cpt of a sample": "cpt(4)",
    "frod": "frod(at=attn.[qv])",
    "adamss": "adamss(r=20, subspaces=3, rank=2)",
    "pvera of all": "pvera(r=3, at=linear)",
    "lora": "lora(r=2, dropout=0.1)",
}


@pytest.mark.parametrize("texts", [FAMILY], ids=["all"])
@pytest.mark.equality("packed")
def test_steps_in_company_leave_the_bits_of_as_many_alone(texts: dict[str, str], steps: int, folder: Path) -> None:
    backbone = Backbone.load(folder, torch.float32, training=True)
    jobs = jobs_of(steps, texts)
    assert_as_alone(run(pack_of(backbone, jobs)), jobs, backbone)


def of(name: str, job: TrainJob, backbone: Backbone) -> tuple[Oracle, PeftModel]:
    """PEFT's model of a row, with the tensors that the job starts with."""
    models: list[PeftModel] = []
    config, place = ROWS[name].config, ROWS[name].place
    assert config is not None and place is not None
    found: Find = place

    def noted(model: PeftModel, tensor: str, value: Tensor) -> Place:
        models.append(model)
        return found(model, tensor, value)

    return peft_oracle(backbone.folder, config(), start_of(job, backbone), torch.float64, noted), models[0]


def read(job: TrainJob) -> Iterator[tuple[int, int]]:
    """Step and number of every sample, as an oracle reads them."""
    return ((step, number) for step in range(job.steps_total) for number in job.batch(step))


def layer_of(model: PeftModel, site: Site) -> torch.nn.Module:
    return model.get_submodule(f"base_model.model.model.layers.{site.layer}.{MODULES[site.name]}")


def test_pvera_trains_as_pefts_with_the_same_noise(fp64: Backbone) -> None:
    """h = mu + eps exp(logvar / 2), eps ~ N(0, 1) for every row."""
    job = a_job("pvera", ROWS["pvera"].text, seed=2, steps=8)
    oracle, model = of("pvera", job, fp64)
    samples, keys = read(job), torch.empty(0)
    variances = []

    def logits(ids: Tensor) -> Tensor:
        nonlocal keys
        step, number = next(samples)
        keys = dropout_keys((job.key(step), number), len(ids))
        return oracle.logits(ids)

    def noisy(layer: PveraLayer, site: Site) -> None:
        site_key = stream(site, NoisyKey("input"))

        def reparametrised(mean: Tensor, logvar: Tensor, adapter: str) -> Tensor:
            variances.append(logvar.detach().exp().mean())
            return mean + normal_rows(keys, site_key, mean.shape[-1], mean.dtype) * torch.exp(0.5 * logvar)

        layer._reparametrize = reparametrised  # type: ignore[method-assign]

    for layer in range(2):
        for name in ("attn.q", "attn.v", "ffn.down"):
            noisy(layer_of(model, Site(layer, name)), Site(layer, name))  # type: ignore[arg-type]
    expected = trained(Oracle(logits, oracle.places), job)
    found = ours(job, fp64)
    assert_trained(found, expected)
    assert variances and all(found[name].count_nonzero() for name in expected)


def test_poly_trains_as_pefts_with_the_same_draws(fp64: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's router in training, RelaxedBernoulli(1, logits), given the uniform numbers that it would draw."""
    job = a_job("poly", ROWS["poly"].text, seed=1, steps=8)
    oracle, model = of("poly", job, fp64)
    samples, current = read(job), 0

    def logits(ids: Tensor) -> Tensor:
        nonlocal current
        current = next(samples)[0]
        return oracle.logits(ids)

    def drawn(router: PolyRouter, site: Site) -> None:
        real, shape = router.forward, fp64.shape.dims(site.name)

        def forward(task_ids: Tensor, input_ids: Tensor) -> Tensor:
            u = uniform(job.key(current), declare.SiteShape(site.layer, site.name, *shape), router.module_logits)
            with monkeypatch.context() as patch:
                patch.setattr(torch, "rand", lambda size, **_: u.view(size))
                return real(task_ids, input_ids)

        router.forward = forward  # type: ignore[method-assign]
        router.train()

    for layer in range(2):
        for name in ("attn.q", "attn.v", "ffn.down"):
            drawn(layer_of(model, Site(layer, name)).poly_router["default"], Site(layer, name))  # type: ignore[arg-type]
    found, expected = ours(job, fp64), trained(Oracle(logits, oracle.places), job)
    assert_trained(found, expected)
    assert all(found[name].count_nonzero() for name in expected)


def test_cpt_trains_as_pefts_and_stays_in_its_balls(fp64: Backbone) -> None:
    job = a_job("cpt", ROWS["cpt"].text, seed=1, steps=12)
    oracle, model = of("cpt", job, fp64)
    encoder = model.prompt_encoder["default"]
    start = start_of(job, fp64)
    assert torch.equal(start["0.0.embed.context"], fp64.embedding[torch.tensor([5, 17, 300, 42, 8])].double())

    def project(step: int) -> None:
        encoder.delta_embedding.weight.data = encoder.get_projection()

    expected = trained(oracle, job, after_step=project)
    found = ours(job, fp64)
    assert_trained(found, expected)
    radii = (64 / 2048) ** 0.5 * torch.tensor([0.1, 0.2, 0.2, 0.1, 0.0], dtype=torch.float64)
    norms = found["0.0.embed.context_change"].norm(dim=1)
    assert torch.allclose(norms, radii, rtol=1e-6), "all that may move reach the edge at this rate"


def test_a_cpt_without_tokens_starts_as_the_first_sample(fp64: Backbone) -> None:
    values = initialise(a_job("cpt", "cpt(5)", seed=1, steps=1).graft, fp64, seed=0, samples=((7, 8, 9), (1, 2)))
    assert torch.equal(values["0.0.embed.context"], fp64.embedding[torch.tensor([7, 8, 9, 7, 8])].double())


def test_frod_starts_as_the_backbone_with_pefts_basis_and_trains_as_pefts(fp64: Backbone) -> None:
    job = a_job("frod", ROWS["frod"].text, seed=1, steps=8)
    start = start_of(job, fp64)
    config = ROWS["frod"].config
    assert config is not None
    theirs = get_peft_model(plain_llama(fp64.folder, torch.float64), config()).base_model.frod_V
    for name, category in (("attn_q", "self_attn_q_proj"), ("ffn_down", "mlp_down_proj")):
        assert relative(start[f"0.shared.V_{name}"], theirs[category]["default"]) < 1e-6
        rows, columns = start[f"0.shared.i_{name}"].long().T
        assert (rows != columns).all() and len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == len(rows)
    merged = Fold(job.graft, start, fp64.weight)
    for site in merged.sites:
        assert relative(merged.at(site).weight, fp64.weight(site)) < 1e-6
    oracle, _ = of("frod", job, fp64)
    assert_trained(ours(job, fp64), trained(oracle, job))
