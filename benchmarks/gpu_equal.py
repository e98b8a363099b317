"""What must be equal on a GPU: jobs packed and alone, streams mixed and alone, the GPU and the CPU, our NF4 and
bitsandbytes', ours and PEFT."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_card import Card
from gpu_findings import Findings
from gpu_material import LORA, Turned, jobs, model_files, prompt, relative, saved_grafts
from torch import Tensor

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.serving import engine as engine_module
from polygraft.trainers.runner import PackRunner

EXACT, AS_GOOD = 1e-5, 1.5  # design: fp32 rel-L2; bf16's error against fp32 as a multiple of that alone
# One for each op and kind of operands, and unions.
TEXTS: Mapping[str, str] = {
    "lora": "lora(r=8, dropout=0.1)",
    "dora": "dora(r=4, at=attn.v|ffn.down)",
    "ia3": "ia3",
    "bitfit": "bitfit",
    "prefix": "prefix(5)",
    "serial": "serial(8)",
    "parallel": "parallel(16)",
    "prompt": "prompt(6)",
    "vera": "vera(r=8, at=attn.[qv]|ffn.down)",
    "loha": "loha(r=4, at=attn.q)",
    "shira": "shira(r=2, at=attn.q)",
    "hra": "hra(r=4, at=attn.q)",
    "boft": "boft(b=4, m=2, at=attn.o)",
    "oft": "oft(b=8)",
    "road": "road(group=16)",
    "llama-adapter": "llama-adapter(length=6)",
    "molora": "molora(r=2, experts=3, at=attn.q)",
    "pvera": "pvera(r=8, at=attn.[qv])",
    "smop": "smop(4, k=3)",
    "loreft": "loreft(r=4, first=2, last=1)",
    "lpt": "lpt(3)@1",
    "far": "far(density=0.2)",
    "tokens": "trainable-tokens(338|37|176)",
    "union": "prefix(3) + parallel(4, at=ffn.out) + lora(r=2, at=attn.*) + ia3(at=attn.o, feedforward=attn.q)",
    "mezo": "lora(r=4) + mezo",
}
SHAPES = ("tiny", "smollm2-135m")
_STEPS = 4
_TOKENS = 8
_DRY = ("dora", "mezo")


def packed(card: Card, findings: Findings, root: Path) -> None:
    """Every job alone, then all that can in one pack, after one step and after some; and the pack on a CPU."""
    folder = model_files(root, "tiny", card)
    backbone = Backbone.load(folder, torch.float32, training=True, device=card.device)
    chosen, counts = (TEXTS, (1, _STEPS)) if card.real else ({name: TEXTS[name] for name in _DRY}, (1,))
    alone: dict[str, Mapping[int, Tensor]] = {}

    def by_itself(name: str) -> None:
        place = list(chosen).index(name)
        alone[name] = {n: _trained(backbone, {name: chosen[name]}, n, first=place)[name] for n in counts}

    findings.each({f"{name} alone": partial(by_itself, name) for name in chosen})

    def together(steps: int) -> None:
        found = _trained(backbone, chosen, steps, only=alone)
        errors = {name: relative(found[name], alone[name][steps]) for name in alone}
        same = {name: torch.equal(found[name], alone[name][steps]) for name in alone}
        findings.fact(f"packed and alone after {steps} steps: rel-L2", errors)
        findings.fact(f"packed and alone after {steps} steps: the same bits", same)
        findings.claim(f"packed.alone.{steps}", max(errors.values()), "rel-L2", "<", EXACT)

    findings.each({f"in one pack, {steps} steps": partial(together, steps) for steps in counts})

    def on_a_cpu() -> None:
        found = _trained(Backbone.load(folder, torch.float32, training=True), chosen, 1, only=alone)
        errors = {name: relative(alone[name][1], found[name]) for name in alone}
        findings.fact("a step on the GPU and on the CPU: rel-L2", errors)
        findings.claim("packed.cpu", max(errors.values()), "rel-L2", "<", 10 * EXACT)

    if card.real:
        findings.each({"the same pack on the CPU": on_a_cpu})
    else:
        findings.leave_out("the same pack on the CPU", "the device has no values to compare")


def _trained(
    backbone: Backbone, texts: Mapping[str, str], steps: int, *, first: int = 0, only: Container[str] | None = None
) -> Mapping[str, Tensor]:
    """What so many steps lead to, flat. After one it is the gradient, which is what the first moment is then: AdamW's
    own step would be the sign of rounding where a gradient is 0. After more, and without a backward, the tensors."""
    pack = PackRunner(backbone, max_rows=4096)
    for job in jobs(texts, backbone.shape, length=12, samples=steps, epochs=1, first=first):
        if only is None or job.id in only:
            pack.admit(job)
    while any(not running.finished for running in pack.jobs.values()):
        done = pack.step()
        if done.failed:
            raise RuntimeError(str(done.failed))
    slabs = {name: running.slab for name, running in pack.jobs.items()}
    return {
        name: (slab.exp_avg if steps == 1 and "mezo" not in texts[name] else slab.master).cpu()
        for name, slab in slabs.items()
    }


def mixed(card: Card, findings: Findings, root: Path) -> None:
    """Every graft decoding alone, then all that can in one batch, in float32 and bf16; and the batch on a CPU."""
    folder, data = model_files(root, "tiny", card), root / "grafts-tiny"
    chosen = {name: text for name, text in TEXTS.items() if (card.real or name in _DRY) and "mezo" not in text}
    on_cpu = Backbone.load(folder, torch.float32)
    names: dict[str, str | None] = {"bare": None}
    names |= dict(zip(chosen, saved_grafts(data, on_cpu, list(chosen.values())), strict=True))
    alone: dict[str, Mapping[str, Logits]] = {dtype: {} for dtype in ("float32", "bfloat16")[: 2 if card.real else 1]}
    batch: dict[str, Mapping[str, Logits]] = {}
    for dtype in alone:
        backbone = Backbone.load(folder, getattr(torch, dtype), device=card.device)

        def by_itself(name: str, dtype: str = dtype, backbone: Backbone = backbone) -> None:
            alone[dtype] = {**alone[dtype], **_decoded(backbone, data, names, [name])}

        def together(dtype: str = dtype, backbone: Backbone = backbone) -> None:
            batch[dtype] = _decoded(backbone, data, names, list(alone[dtype]))

        findings.each({f"{dtype}, {name} alone": partial(by_itself, name) for name in names})
        findings.each({f"{dtype}, in one batch": together})
    if card.real:
        findings.each({"on the CPU": lambda: batch.update(cpu=_decoded(on_cpu, data, names, list(alone["float32"])))})
    else:
        findings.leave_out("on the CPU", "the device has no values to compare")
    for key, others, limit in (("alone", alone["float32"], EXACT), ("cpu", batch.get("cpu", {}), 2 * EXACT)):
        if others:
            findings.each({f"compared, {key}": partial(_compared, findings, key, batch, others, limit)})
    if card.real:
        findings.each({"compared, bf16": lambda: _compared_bf16(findings, alone, batch["bfloat16"])})


def _compared(
    findings: Findings,
    key: str,
    batch: Mapping[str, Mapping[str, Logits]],
    wanted: Mapping[str, Logits],
    limit: float,
) -> None:
    found = batch["float32"]
    both = [name for name in found if name in wanted]
    errors = {name: _first_differing(found[name], wanted[name]) for name in both}
    findings.fact(f"mixed and {key}: rel-L2 of logits", errors)
    findings.claim(f"mixed.{key}", max(errors.values(), default=float("nan")), "rel-L2", "<", limit)
    same = [name for name in both if found[name].tokens == wanted[name].tokens]
    findings.claim(f"mixed.{key}.tokens", len(same) / max(1, len(both)), "of the streams, their tokens the same")


def _compared_bf16(findings: Findings, alone: Mapping[str, Mapping[str, Logits]], found: Mapping[str, Logits]) -> None:
    """The first step's logits: what follows depends on the tokens."""
    ratio = {}
    for name in found:
        true, own = alone["float32"][name].rows[0], alone["bfloat16"][name].rows[0]
        ratio[name] = relative(found[name].rows[0], true) / max(relative(own, true), 2.0**-12)
    findings.fact("bf16: error mixed over error alone", ratio)
    findings.claim("mixed.bf16", max(ratio.values()), "times the error alone", "<", AS_GOOD)


class Logits:
    """A stream's tokens, and the logits that each was taken from."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.rows: list[Tensor] = []


def _decoded(
    backbone: Backbone, data: Path, names: Mapping[str, str | None], group: Sequence[str]
) -> Mapping[str, Logits]:
    """Greedy streams of the grafts of a group, all at once; a stream is the same whatever the group."""
    found = {name: Logits() for name in group}
    turned = Turned.of(backbone, data, [graft for name in group if (graft := names[name]) is not None])
    streams = dict(enumerate(names))
    with _heard(found, streams):
        for place, name in streams.items():
            if name in found:
                turned.submit(name, names[name], prompt(place, 5 + place % 9), _TOKENS, seed=place)
        turned.run()
    turned.engine.stop()
    for name, tokens in turned.tokens.items():
        found[name].tokens = tokens
    return found


@contextmanager
def _heard(found: Mapping[str, Logits], streams: Mapping[int, str]) -> Iterator[None]:
    """Keep the logits that tokens are taken from; a stream is known by its seed."""
    sample = vars(engine_module)["sample"]

    def recorded(logits: Tensor, draws: Sequence[Any]) -> Any:
        for row, draw in zip(logits, draws, strict=True):
            found[streams[draw.seed]].rows.append(row.cpu())
        return sample(logits, draws)

    with patch.object(engine_module, "sample", recorded):
        yield


def _first_differing(found: Logits, wanted: Logits) -> float:
    """The worst step of those before whose token both had said the same."""
    worst = 0.0
    for step, (a, b) in enumerate(zip(found.rows, wanted.rows, strict=True)):
        if found.tokens[:step] != wanted.tokens[:step]:
            break
        worst = max(worst, relative(a, b))
    return worst


def nf4(card: Card, findings: Findings, root: Path) -> None:
    """Logits on a backbone in NF4 beside bitsandbytes' own modules, the bytes of both, and jobs that learn on it."""
    if not card.real:
        findings.leave_out("nf4", "bitsandbytes takes no tensors without values")
        return
    folder = model_files(root, SHAPES[-1], card)
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        findings.each({name: partial(_nf4, card, findings, folder, name, dtype)})


def _nf4(card: Card, findings: Findings, folder: Path, name: str, dtype: torch.dtype) -> None:
    """The oracle is the plain model with every projection given back from NF4 by bitsandbytes, in float64 and in the
    dtype; its own 4-bit modules, which multiply as they see fit, are only told of."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    ids, taken = torch.tensor([prompt(3, 40)]), {}
    before = card.forget_peak()
    modules = _transformers(folder, dtype, quantization_config=config, device_map={"": str(card.device)})
    taken["bitsandbytes"] = card.forget_peak() - before
    theirs = _plain_logits(card, modules, ids)
    del modules
    plain = _transformers(folder, dtype).to(card.device)
    dense = _plain_logits(card, plain, ids)
    for module in plain.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = _given_back(module.weight.data)
    coarse = _plain_logits(card, plain, ids)
    wanted = _plain_logits(card, plain.double(), ids)
    del plain
    before = card.forget_peak()
    backbone = Backbone.load(folder, dtype, quantise="nf4", device=card.device)
    taken["ours"] = card.forget_peak() - before
    found = _logits(backbone, ids[0])
    del backbone
    logits = {"ours": found, "given back": coarse, "bitsandbytes' modules": theirs, "no quantisation": dense}
    errors = {who: relative(own, wanted) for who, own in logits.items()}
    findings.fact(f"{name}: rel-L2 to the weights given back, in float64", errors)
    findings.fact(f"{name}: bytes", taken)
    ratio = errors["ours"] / max(errors["given back"], EXACT / 10)
    findings.claim(f"nf4.logits.{name}", ratio, "times the error of transformers in this dtype", "<", AS_GOOD)
    findings.claim(f"nf4.learns.{name}", _learnt(card, folder, dtype), "of the first losses is left", "<", 1.0)


def _transformers(folder: Path, dtype: torch.dtype, **options: object) -> Any:
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return made.eval()


def _plain_logits(card: Card, model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids.to(card.device)).logits[0].cpu()
    return found


def _given_back(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    found: Tensor = dequantize_4bit(codes, state)
    return found


def _learnt(card: Card, folder: Path, dtype: torch.dtype) -> float:
    """What is left, at the most, of the losses of two jobs on the backbone in NF4."""
    pack = PackRunner(Backbone.load(folder, dtype, training=True, quantise="nf4", device=card.device))
    for job in jobs({"a": LORA, "b": "lora(r=4, dropout=0.1)"}, pack.backbone.shape, length=32, samples=4, epochs=8):
        pack.admit(job)
    losses: dict[str, list[float]] = {"a": [], "b": []}
    while any(not running.finished for running in pack.jobs.values()):
        for stepped in pack.step().stepped:
            losses[stepped.job].append(stepped.loss)
    return max(sum(own[-4:]) / sum(own[:4]) for own in losses.values())


def _logits(backbone: Backbone, ids: Tensor) -> Tensor:
    from polygraft.grafts.runtime.attention import WholeSequences
    from polygraft.grafts.runtime.route import Rows

    with torch.inference_mode():
        rows, attention = Rows(ids, torch.arange(len(ids)), ()), WholeSequences(((0, len(ids)),), backbone.shape)
        return backbone.logits(backbone.forward(rows, backbone.stacks(()), attention)).cpu()


def peft(card: Card, findings: Findings, root: Path) -> None:
    """Logits under LoRAs in one batch, in float32, beside PEFT's own with one adapter after the other."""
    if not card.real:
        findings.leave_out("peft", "transformers asks for values of the device")
        return
    from peft import PeftModel

    for shape in SHAPES:
        folder, data = model_files(root, shape, card), root / f"grafts-peft-{shape}"
        backbone = Backbone.load(folder, torch.float32, device=card.device)
        grafts = saved_grafts(data, backbone, [LORA] * 3)
        names: dict[str, str | None] = {f"{place}": graft for place, graft in enumerate(grafts)}
        found = _decoded(backbone, data, names, list(names))
        errors = {}
        for place, (name, graft) in enumerate(names.items()):
            base = _transformers(folder, torch.float32).to(card.device)
            theirs: Any = PeftModel.from_pretrained(base, data / "grafts" / str(graft))
            theirs.eval()
            ids = torch.tensor([[*prompt(place, 5 + place % 9), *found[name].tokens[:-1]]], device=card.device)
            with torch.inference_mode():
                logits = theirs(input_ids=ids).logits[0, -len(found[name].rows) :]
            errors[name] = relative(torch.stack(found[name].rows), logits)
        findings.fact(f"{shape}: logits, rel-L2 to PEFT", errors)
        findings.claim(f"peft.logits.{shape}", max(errors.values()), "rel-L2", "<", EXACT)
