"""Where a step's time goes on the GPU: traces, launches and idle time, the memory of methods, and whether a CUDA graph
takes a decoding step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from gpu_card import Card
from gpu_findings import Findings
from gpu_material import GRAFTS, LORA, Turned, jobs, model_files, prompt, saved_grafts
from torch import Tensor

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.trainers.runner import PackRunner

_STREAMS, _STEPS, _WARM = 16, 4, 4
# Methods whose point is memory, beside the plain one.
MEMORY: Mapping[str, str] = {
    "lora": "lora(r=16, at=linear)",
    "lora-fa": "lora-fa(r=16, at=linear)",
    "vera": "vera(r=64, at=linear)",
    "ia3": "ia3",
    "bitfit": "bitfit",
    "mezo": "lora(r=16, at=linear) + mezo",
}


def traces(card: Card, findings: Findings, root: Path, out: Path) -> None:
    """torch.profiler's traces of decoding steps, bare and mixed, and of packed training steps, into `out`."""
    for shape in ("smollm2-135m", "llama-1b") if card.real else ("tiny",):
        folder = model_files(root, shape, card)
        findings.each(
            {
                f"{shape}: decoding": partial(_decoding, card, findings, root, folder, out),
                f"{shape}: training": partial(_training, card, findings, folder, out),
            }
        )


def _decoding(card: Card, findings: Findings, root: Path, folder: Path, out: Path) -> None:
    backbone, data = Backbone.load(folder, torch.bfloat16, device=card.device), root / f"grafts-traces-{folder.name}"
    grafts = saved_grafts(data, backbone, [LORA] * _count(card))
    for name in ("bare", "mixed"):
        turned = Turned.of(backbone, data, grafts)
        for stream in range(_STREAMS):
            graft = grafts[stream % len(grafts)] if name == "mixed" else None
            turned.submit(str(stream), graft, prompt(stream, 24), 64)
        _traced(card, findings, f"{folder.name}-{name}", turned.engine.turn, out)
        turned.engine.stop()


def _training(card: Card, findings: Findings, folder: Path, out: Path) -> None:
    pack = PackRunner(Backbone.load(folder, torch.bfloat16, training=True, device=card.device), max_rows=GRAFTS * 64)
    texts = {str(place): LORA for place in range(_count(card))}
    for job in jobs(texts, pack.backbone.shape, length=64, samples=4, epochs=100):
        pack.admit(job)
    _traced(card, findings, f"{folder.name}-training", pack.step, out)


def _count(card: Card) -> int:
    """Of grafts; a dry run is to go through the code once."""
    return GRAFTS if card.real else 2


def _traced(card: Card, findings: Findings, name: str, step: Callable[[], object], out: Path) -> None:
    """A trace of some steps after others; what a step takes by the clock, without the profiler."""
    for _ in range(_WARM if card.real else 1):
        step()
    seconds = card.seconds(step, _STEPS) if card.real else None
    with card.profiled(out / f"trace-{name}.json.gz") as summary:
        for _ in range(_STEPS if card.real else 1):
            step()
    findings.fact(f"{name}: a step", {"seconds": seconds, "steps traced": _STEPS, "trace": dict(summary())})


def memory(card: Card, findings: Findings, root: Path) -> None:
    """The most that a job's step takes beside the loaded model, method by method: one job, samples of 512 tokens."""
    shape, length = ("llama-1b", 512) if card.real else ("tiny", 12)
    backbone = Backbone.load(model_files(root, shape, card), torch.bfloat16, training=True, device=card.device)
    taken: dict[str, int] = {}

    def step(name: str) -> None:
        before, pack = card.forget_peak(), PackRunner(backbone, max_rows=4 * length)
        pack.admit(jobs({name: MEMORY[name]}, backbone.shape, length=length, samples=4, epochs=4)[0])
        pack.step()
        taken[name] = card.peak() - before
        pack.remove(name)

    findings.each({name: partial(step, name) for name in (MEMORY if card.real else ("lora", "mezo"))})
    findings.fact(f"{shape}, {length} tokens: bytes of a step beside the model", taken)


def graph(card: Card, findings: Findings, root: Path) -> None:
    """Whether a CUDA graph takes the forward of a decoding step, and what it spares."""
    if not card.real:
        findings.leave_out("graph", "the device has no graphs; tests/serving/test_on_a_gpu.py counts what hinders one")
        return
    folder, data = model_files(root, "smollm2-135m", card), root / "grafts-graph"
    backbone = Backbone.load(folder, torch.bfloat16, device=card.device)
    grafts = saved_grafts(data, backbone, [LORA] * GRAFTS)
    for name in ("bare", "mixed"):
        findings.each({name: partial(_captured, card, findings, backbone, data, grafts if name == "mixed" else ())})


def _captured(card: Card, findings: Findings, backbone: Backbone, data: Path, grafts: tuple[str, ...]) -> None:
    name = "mixed" if grafts else "bare"
    turned = Turned.of(backbone, data, grafts)
    for stream in range(_STREAMS):
        turned.submit(str(stream), grafts[stream % GRAFTS] if grafts else None, prompt(stream, 24), 64)
    calls: list[tuple[object, ...]] = []
    forward = backbone.forward

    def kept(*given: object) -> Tensor:
        calls.append(given)
        return forward(*given)  # type: ignore[arg-type]

    try:
        backbone.forward = kept  # type: ignore[method-assign,assignment]
        for _ in range(_WARM):
            turned.engine.turn()
    finally:
        del backbone.forward  # the class's own again

    @torch.inference_mode()
    def step() -> Tensor:
        return backbone.forward(*calls[-1])  # type: ignore[arg-type]  # the last step again, into the same blocks

    eager = card.seconds(step, 20)
    findings.fact(f"{name}: seconds of the forward", eager)
    captured = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(captured):
            step()
    except Exception as error:
        findings.fact(f"{name}: captured", f"no: {type(error).__name__}: {error}"[:400])
        return
    findings.fact(f"{name}: captured", "yes")
    findings.claim(f"graph.{name}", eager / card.seconds(captured.replay, 20), "times the forward without a graph")
