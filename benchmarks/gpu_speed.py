"""The engine and the pack on the GPU beside transformers and PEFT there: one process, arms in turn, round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from gpu_card import Card
from gpu_findings import Findings
from gpu_material import GRAFTS, LORA, Turned, jobs, model_files, prompt, samples_of, saved_grafts
from measure import Goal

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.trainers.runner import PackRunner

ROUNDS = 5
SHAPES = ("smollm2-135m", "llama-1b")
STREAMS = (16, 64)
TOKENS, PROMPT = 48, 24
LENGTHS = (64, 512)  # tokens of a job's sample
_STEPS = 3

Arms = Mapping[str, Callable[[], float]]


def serving(card: Card, findings: Findings, root: Path) -> None:
    """Tokens a second of a burst of streams, prefill and all: ours bare and over eight LoRAs, transformers' generate
    bare, and with PEFT's adapter_names."""
    if not card.real:
        _dry_serving(card, root)
        findings.leave_out("transformers and PEFT", "they ask for values of the device")
        return
    for shape in SHAPES:
        findings.each({shape: partial(_serving, card, findings, root, shape)})


def _dry_serving(card: Card, root: Path) -> None:
    backbone = Backbone.load(model_files(root, "tiny", card), torch.bfloat16, device=card.device)
    grafts = saved_grafts(root / "grafts-serving-tiny", backbone, [LORA] * 2)
    turned = Turned.of(backbone, root / "grafts-serving-tiny", grafts)
    for names in ([None] * 2, grafts):
        _burst(turned, card, names, streams=3, tokens=2)


def _serving(card: Card, findings: Findings, root: Path, shape: str) -> None:
    folder, data = model_files(root, shape, card), root / f"grafts-serving-{shape}"
    memory = {"before": card.forget_peak()}
    backbone = Backbone.load(folder, torch.bfloat16, device=card.device)
    grafts = saved_grafts(data, backbone, [LORA] * GRAFTS)
    turned = Turned.of(backbone, data, grafts)
    _burst(turned, card, grafts, streams=4, tokens=2)
    memory["ours, with its cache of 1 GiB"] = card.peak()
    arms: dict[str, Callable[[], float]] = {}
    for streams in STREAMS:
        arms[f"ours mixed {streams}"] = partial(_burst, turned, card, grafts, streams, TOKENS)
        arms[f"ours bare {streams}"] = partial(_burst, turned, card, [None], streams, TOKENS)
    before = card.forget_peak()
    with findings.item(f"{shape}: transformers and PEFT load"):
        generate = _Generate(card, folder, [data / "grafts" / graft for graft in grafts])
        memory["transformers and PEFT"] = card.peak() - before
        for streams in STREAMS:
            arms[f"peft mixed {streams}"] = partial(generate.burst, streams, mixed=True)
            arms[f"transformers bare {streams}"] = partial(generate.burst, streams, mixed=False)
    findings.fact(f"{shape}: bytes", memory)
    samples = _in_turn(findings, shape, arms)
    for streams in STREAMS:
        mixed, bare = f"ours mixed {streams}", f"ours bare {streams}"
        for ours, theirs in (
            (mixed, f"peft mixed {streams}"),
            (bare, f"transformers bare {streams}"),
            (mixed, bare),
        ):
            findings.ratios(Goal(f"serving.{shape}.{ours} over {theirs}", "speed", ours, (theirs,)), samples)
    turned.engine.stop()


def _burst(turned: Turned, card: Card, grafts: Sequence[str | None], streams: int, tokens: int) -> float:
    card.wait()
    start = time.perf_counter()
    for stream in range(streams):
        turned.submit(str(stream), grafts[stream % len(grafts)], prompt(stream, PROMPT), tokens)
    turned.run()
    card.wait()
    return streams * tokens / (time.perf_counter() - start)


class _Generate:
    """transformers' generate, on the bare model, and on one with all adapters, one of them for each row."""

    def __init__(self, card: Card, folder: Path, grafts: Sequence[Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        def model() -> Any:
            made: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            return made.to(card.device).eval()

        self._card, self._bare = card, model()
        self._mixed: Any = PeftModel.from_pretrained(model(), grafts[0], adapter_name="0", autocast_adapter_dtype=False)
        for place, graft in enumerate(grafts[1:], 1):
            self._mixed.load_adapter(graft, str(place), autocast_adapter_dtype=False)
        self._mixed.eval()

    @torch.inference_mode()
    def burst(self, streams: int, *, mixed: bool) -> float:
        ids = torch.tensor([prompt(stream, PROMPT) for stream in range(streams)], device=self._card.device)
        said: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "do_sample": False,
            "min_new_tokens": TOKENS,
            "max_new_tokens": TOKENS,
            "pad_token_id": 0,
        }
        self._card.wait()
        start = time.perf_counter()
        if mixed:
            self._mixed.generate(**said, adapter_names=[str(stream % GRAFTS) for stream in range(streams)])
        else:
            self._bare.generate(**said)
        self._card.wait()
        return streams * TOKENS / (time.perf_counter() - start)


def training(card: Card, findings: Findings, root: Path) -> None:
    """Tokens a second of eight LoRA jobs: one pack, PEFT with one job after the other, and PEFT that switches."""
    if not card.real:
        backbone = Backbone.load(model_files(root, "tiny", card), torch.bfloat16, training=True, device=card.device)
        _pack(backbone, 16, count=2).step()
        findings.leave_out("PEFT", "transformers asks for values of the device")
        return
    for shape in SHAPES:
        for length in LENGTHS:
            findings.each({f"{shape}, {length}": partial(_training, card, findings, root, shape, length)})


def _training(card: Card, findings: Findings, root: Path, shape: str, length: int) -> None:
    folder, name = model_files(root, shape, card), f"{shape}, {length} tokens a job"
    before = card.forget_peak()
    pack = _pack(Backbone.load(folder, torch.bfloat16, training=True, device=card.device), length)
    loaded = card.forget_peak()
    _step(pack, card, length)
    memory = {"ours, loaded": loaded - before, "ours, at the most": card.peak() - before}
    arms: dict[str, Callable[[], float]] = {"ours": partial(_step, pack, card, length)}
    before = card.forget_peak()
    with findings.item(f"{name}: PEFT loads"):
        peft = _Peft(card, folder, length)
        loaded = card.forget_peak()
        peft.step(switching=True)
        memory |= {"peft, loaded": loaded - before, "peft, at the most": card.peak() - before}
        arms |= {
            "peft in turn": partial(peft.step, switching=False),
            "peft switching": partial(peft.step, switching=True),
        }
    findings.fact(f"{name}: bytes", memory)
    samples = _in_turn(findings, name, arms)
    rivals = tuple(arm for arm in arms if arm != "ours")
    findings.ratios(Goal(f"training.{name}", "speed", "ours", rivals), samples)


def _pack(backbone: Backbone, length: int, count: int = GRAFTS) -> PackRunner:
    pack = PackRunner(backbone, max_rows=count * length)
    texts = {str(place): LORA for place in range(count)}
    for job in jobs(texts, backbone.shape, length=length, samples=4, epochs=10_000):
        pack.admit(job)
    return pack


def _step(pack: PackRunner, card: Card, length: int) -> float:
    card.wait()
    start = time.perf_counter()
    stepped = 0
    while stepped < GRAFTS * _STEPS:
        stepped += len(pack.step().stepped)
    card.wait()
    return stepped * length / (time.perf_counter() - start)


class _Peft:
    """One model, an adapter and an AdamW for each job."""

    def __init__(self, card: Card, folder: Path, length: int) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        self._card, self._length = card, length
        base.to(card.device)
        self._model = get_peft_model(base, config, adapter_name="0", autocast_adapter_dtype=False).train()
        for place in range(1, GRAFTS):
            self._model.add_adapter(str(place), config)
        self._optimisers, self._samples = {}, {}
        for place in range(GRAFTS):
            self._model.set_adapter(str(place))
            own = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
            self._optimisers[place] = torch.optim.AdamW(own, lr=1e-4, weight_decay=0.0, fused=True)
            self._samples[place] = cycle([sample.ids for sample in samples_of(place, 4, length)])

    def step(self, *, switching: bool) -> float:
        """As many steps of every job as the pack's; switching goes round them, in turn takes one after the other."""
        order = range(GRAFTS) if switching else [place for place in range(GRAFTS) for _ in range(_STEPS)]
        self._card.wait()
        start, last = time.perf_counter(), -1
        for place in list(order) * (_STEPS if switching else 1):
            if place != last:
                self._model.set_adapter(str(place))
            last = place
            ids = torch.tensor([next(self._samples[place])], device=self._card.device)
            logits = self._model(input_ids=ids[:, :-1], use_cache=False).logits
            torch.nn.functional.cross_entropy(logits[0].float(), ids[0, 1:]).backward()  # type: ignore[no-untyped-call]
            self._optimisers[place].step()
            self._optimisers[place].zero_grad()
        self._card.wait()
        return GRAFTS * _STEPS * self._length / (time.perf_counter() - start)


def _in_turn(findings: Findings, name: str, arms: Arms) -> list[Mapping[str, float]]:
    """Every arm once to warm it, then rounds while there is time; an arm that fails is out."""
    running = dict(arms)
    samples: list[Mapping[str, float]] = []
    for number in range(ROUNDS + 1):
        if findings.left <= 0:
            findings.leave_out(f"{name}: round {number}", "the part's time was over")
            break
        sample: dict[str, float] = {}
        for arm in list(running):
            try:
                sample[arm] = running[arm]()
            except Exception as error:
                findings.failed[f"{name}: {arm}"] = f"{type(error).__name__}: {error}"[:600]
                del running[arm]
        if number:
            samples.append(sample)
            findings.fact(f"{name}: tokens/s", samples)
    return samples
