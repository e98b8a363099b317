"""On other architectures than Llama, too, a job's gradient has the same bits whoever shares its forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.stacks import Resident
from polygraft.grafts.spec import SpecError
from polygraft.trainers.job import Sample, TrainConfig, TrainJob
from polygraft.trainers.loss import losses_and_gradient
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.packed_forward import forward_backward
from polygraft.trainers.runner import PackRunner
from tests.tiny import tiny_model

TEXTS = ("lora(r=4)", "parallel(8)", "dora(r=2, at=attn.*)", "ia3", "prefix(3)", "bitfit", "serial(4)")


ARCHITECTURES = ("gpt2", "gpt_neox", "opt", "phi", "qwen3", "bert", "mistral", "gemma2", "gemma3_text")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_gradient_has_the_same_bits_alone_and_in_company(one_thread: None, folder: Path, dtype: torch.dtype) -> None:
    backbone = Backbone.load(folder, dtype, training=True)
    everyone = tuple(range(len(TEXTS)))
    losses, gradients = gradients_of(backbone, everyone)
    for job in everyone:
        (loss,), (own,) = gradients_of(backbone, (job,))
        assert loss == losses[job]
        assert all(torch.equal(a, b) for a, b in zip(own, gradients[job], strict=True)), TEXTS[job]


def test_the_loss_of_capped_logits_is_transformers_own(tmp_path: Path) -> None:
    """Gemma 2: by autograd through its head and its cap (arXiv 2408.00118, section 2)."""
    backbone = Backbone.load(tiny_model(tmp_path, "gemma2"), torch.float64, training=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    cap, targets, factors = theirs.config.final_logit_softcapping, torch.arange(40), torch.rand(40).double()
    hidden = (4 * torch.randn(40, 64).double()).requires_grad_()
    expected = cross_entropy(cap * torch.tanh(theirs.lm_head(hidden) / cap), targets, reduction="none")
    (expected * factors).sum().backward()
    losses, gradient = losses_and_gradient(backbone, hidden.detach(), targets, factors)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-9, atol=1e-12)


def test_a_pack_on_an_encoder_does_not_take_a_job_that_learns_to_say_the_next_token(folder: Path) -> None:
    backbone = Backbone.load(folder, torch.float32, training=True)
    if backbone.shape.causal:
        assert PackRunner(backbone).jobs == {}
        return
    config = TrainConfig(epochs=1, batch_size=1, learning_rate=0.1)
    job = TrainJob("job", BoundGraft(parse(TEXTS[0]), backbone.shape), config, (Sample((1, 2), (0.0, 1.0)),))
    pack = PackRunner(backbone)
    with pytest.raises(SpecError, match="bert is an encoder"):
        pack.admit(job)
    assert pack.jobs == {}


def gradients_of(backbone: Backbone, jobs: tuple[int, ...]) -> tuple[list[float], list[list[Tensor]]]:
    """Losses and trained tensors' gradients of one forward of `jobs`, each with samples of its own."""
    residents, micro_batches = [], []
    for place, job in enumerate(jobs):
        generator = torch.Generator().manual_seed(job)
        graft = BoundGraft(parse(TEXTS[job]), backbone.shape)
        values = initialise(graft, backbone, seed=job, samples=((5, 6, 7),))
        values = {n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in values.items()}
        residents.append(Resident(str(job), graft, values))
        lengths = torch.randint(4, 40, (2,), generator=generator).tolist()
        ids = [tuple(torch.randint(2, 512, (n,), generator=generator).tolist()) for n in lengths]
        samples = tuple(Sample(row, (0.0,) + (1.0,) * (len(row) - 1)) for row in ids)
        micro_batches.append(MicroBatch(place, graft.prefix_length, samples, (0, 1), float(sum(lengths))))
    stacks = backbone.stacks(residents, trainable=True)
    losses = forward_backward(backbone, stacks, micro_batches)
    found = stacks.gradients()
    pulled = [stacks.gradient(place, found[place]) for place in range(len(jobs))]
    return losses, [[g.clone() for g in own if g is not None] for own in pulled]
