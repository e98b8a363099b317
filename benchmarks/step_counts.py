"""What a step asks of the host and of the device, counted and not timed: calls of functions, and launches on a GPU that
is not there.

python benchmarks/step_counts.py [--json PATH] [--layers N]

A decoding step of 16 streams, bare and over 8 LoRA (r=16, all linears), and a packed training step of 8 such jobs of 64
tokens each, on a model as deep as SmolLM2, of widths that the compiled products take (no count depends on which). Calls
are Python's and C's together, as cProfile counts them. On the CPU the compiled products run where the machine has them.
On the fake device (`tests/fake_gpu.py`) what torch does in Python to pretend a device is left out, and a launch of
Triton's, some fifty calls of its own, is none. `sends` are copies from the host to the device, `reads` those back, both
by the line that asked; a CUDA graph can take what is between them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import machine
import torch
from rich.console import Console
from rich.table import Table
from tests_folder import tests_of
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from polygraft.cluster.model import GraftId, ReplicaId, TenantId
from polygraft.cluster.settings import ServeSettings
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone, best_dtype
from polygraft.serving.engine import Engine
from polygraft.serving.request import GenerationRequest
from polygraft.trainers.job import Sample, TrainConfig, TrainJob
from polygraft.trainers.runner import PackRunner

tests_of(machine.ROOT)
from tests.fake_gpu import DEVICE, FakeGpu, Watched, fake_gpu  # noqa: E402

LAYERS, STREAMS, GRAFTS, TOKENS = 30, 16, 8, 64
GRAFT = "lora(r=16, alpha=32, at=linear)"
_WARM = 3  # steps before the one that is counted
# Python that stands for C++ where a device is: none of it is called on a GPU.
_PRETENDING = (
    "/tests/fake_gpu.py",
    "/torch/_subclasses/",
    "/torch/_library/",
    "/torch/_dynamo/",
    "/torch/_compile.py",
    "/torch/compiler/",
    "/torch/utils/_python_dispatch.py",
    "/torch/utils/weak.py",
    "/weakref.py",
)


@dataclass
class Calls:
    """Python functions called, by our folder or the library; and functions of C."""

    python: Counter[str] = field(default_factory=Counter)
    c: int = 0


@dataclass(frozen=True)
class Step:
    """A step's counts; `forward` are those between the rows that it is given and the logits."""

    calls: Calls
    forward: int
    device: Mapping[str, Mapping[str, int]] | None = None
    forward_device: Mapping[str, Mapping[str, int]] | None = None

    @property
    def python(self) -> int:
        return self.calls.python.total()

    @property
    def total(self) -> int:
        """Python's and C's, as cProfile counts them."""
        return self.python + self.calls.c


@contextmanager
def counted() -> Iterator[Calls]:
    """Count the calls inside, but for those that pretend a device."""
    calls, pretending = Calls(), 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal pretending
        if event == "call":
            if frame.f_code.co_filename == __file__:
                return
            if pretending or any(part in frame.f_code.co_filename for part in _PRETENDING):
                pretending += 1
            else:
                calls.python[_owner(frame.f_code.co_filename)] += 1
        elif event == "return" and pretending:
            pretending -= 1
        elif event == "c_call" and not pretending:
            calls.c += 1

    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def _owner(file: str) -> str:
    """The folder of ours, or the package, that a file is of."""
    parts = Path(file).parts
    for mark in ("polygraft", "site-packages"):
        if mark in parts:
            return parts[parts.index(mark) + 1]
    return "python" if "lib" in parts else parts[0]


def backbone_files(folder: Path, layers: int) -> Path:
    """A random model with SmolLM2's heads, and narrow ones."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=288,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def decoding(backbone: Backbone, data: Path, *, mixed: bool, gpu: FakeGpu | None) -> Step:
    """A step in which every stream gets one token."""
    bound, grafts = BoundGraft(parse(GRAFT), backbone.shape), []
    settings = ServeSettings(max_rows=STREAMS * 8)
    engine = Engine(backbone, settings, replica=ReplicaId("counted"), data=data)
    residency = engine._streams.residency
    for seed in range(GRAFTS if mixed else 0):
        values = initialise(bound, backbone, seed=seed, samples=((3, 4),))
        values = {name: value + 0.01 for name, value in values.items()}
        id = native.save(data / "grafts", bound, values, backbone=backbone.fingerprint)
        grafts.append(GraftId(id))
        residency.admit(residency.fetch(grafts[-1]), grafts)  # read in this thread, which alone has the device
    for stream in range(STREAMS):
        graft = grafts[stream % GRAFTS] if mixed else None
        prompt = tuple(range(3, 9))
        request = GenerationRequest(
            id=str(stream), tenant=TenantId("t"), graft=graft, prompt_ids=prompt, max_tokens=20, temperature=0.0
        )
        engine.submit(request)
    for _ in range(_WARM):
        engine.turn()
    assert len(engine._streams.running) == STREAMS
    step = _counted_step(backbone, engine.turn, gpu)
    engine.stop()
    return step


def training(backbone: Backbone, *, gpu: FakeGpu | None) -> Step:
    """A packed step, forward and backward and every job's optimiser step."""
    pack = PackRunner(backbone)
    samples = tuple(Sample(tuple(range(3, 4 + TOKENS)), (0.0,) + (1.0,) * TOKENS) for _ in range(8))
    for seed in range(GRAFTS):
        config = TrainConfig(epochs=9, batch_size=1, learning_rate=1e-3, seed=seed)
        pack.admit(TrainJob(str(seed), BoundGraft(parse(GRAFT), backbone.shape), config, samples))
    for _ in range(_WARM):
        pack.step()
    return _counted_step(backbone, pack.step, gpu)


def _counted_step(backbone: Backbone, do: Callable[[], object], gpu: FakeGpu | None) -> Step:
    """Two runs of the same step: one is counted whole, of the other the forward and the logits."""
    with counted() as calls:
        whole = _watched(gpu, do)
    parts: list[Calls] = []
    devices: list[Watched] = []
    original = {name: getattr(backbone, name) for name in ("forward", "logits")}

    def counting(call: Callable[..., object]) -> Callable[..., object]:
        def inner(*args: object) -> object:
            result: list[object] = []
            with counted() as found:
                watched = _watched(gpu, lambda: result.append(call(*args)))
            parts.append(found)
            devices.append(watched)
            return result[0]

        return inner

    try:
        for name, call in original.items():
            setattr(backbone, name, counting(call))
        do()
    finally:
        for name, call in original.items():
            setattr(backbone, name, call)
    inside = sum(part.python.total() for part in parts)
    if gpu is None:
        return Step(calls, inside)
    return Step(calls, inside, _plain([whole]), _plain(devices))


def _watched(gpu: FakeGpu | None, do: Callable[[], object]) -> Watched:
    if gpu is None:
        do()
        return Watched()
    with gpu.watch() as watched:
        do()
    return watched


def _plain(found: Sequence[Watched]) -> Mapping[str, Mapping[str, int]]:
    fields = ("programs", "operations", "reads", "sends", "host")
    totals = {name: sum((getattr(one, name) for one in found), Counter[str]()) for name in fields}
    return {name: dict(total.most_common()) for name, total in totals.items()}


def steps(folder: Path, gpu: FakeGpu | None) -> Mapping[str, Step]:
    """The three steps, on the CPU or on the fake device."""
    device, dtype = ("cpu", best_dtype()) if gpu is None else (DEVICE, torch.bfloat16)
    serving = Backbone.load(folder, dtype, device=device)
    data = folder / f"data-{'cpu' if gpu is None else 'gpu'}"
    found = {name: decoding(serving, data / name, mixed=name == "mixed", gpu=gpu) for name in ("bare", "mixed")}
    return {**found, "training": training(Backbone.load(folder, dtype, training=True, device=device), gpu=gpu)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Python calls and launches of a step; nothing is timed.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    given = parser.parse_args()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        files = backbone_files(Path(folder), given.layers)
        on_cpu = steps(files, None)
        with fake_gpu() as gpu:
            on_gpu = steps(files, gpu)
    show(on_cpu, on_gpu)
    if given.json:
        said = {"layers": given.layers, "commit": machine.commit(), "sources": machine.sources()}
        described = {"machine": asdict(machine.describe()), "versions": machine.versions()}
        found = {name: {step: _facts(one) for step, one in those.items()} for name, those in
                 (("cpu", on_cpu), ("fake gpu", on_gpu))}  # fmt: skip
        given.json.write_text(json.dumps({"benchmark": "step_counts", **said, **described, "steps": found}, indent=1))


def _facts(step: Step) -> Mapping[str, object]:
    totals = {
        "calls": step.total,
        "python_calls": step.python,
        "forward_python_calls": step.forward,
        "c_calls": step.calls.c,
    }
    return {**totals, "python_by_owner": dict(step.calls.python.most_common()), "device": step.device,
            "forward_device": step.forward_device}  # fmt: skip


def show(on_cpu: Mapping[str, Step], on_gpu: Mapping[str, Step]) -> None:
    console = Console(width=150)
    table = Table(title="a step", title_justify="left")
    for column in ("step", "where", "calls", "of Python", "in the forward", "our programs", "library's", "sends",
                   "reads", "in the forward"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("step", "where") else "right")
    for where, found in (("CPU", on_cpu), ("fake GPU", on_gpu)):
        for name, step in found.items():
            table.add_row(name, where, str(step.total), str(step.python), str(step.forward), *_device(step))
    console.print(table)
    for name, step in on_gpu.items():
        assert step.device is not None and step.forward_device is not None
        for kind in ("sends", "reads"):
            inside = step.forward_device[kind]
            for line, count in step.device[kind].items():
                where = " (inside the forward)" if line in inside else ""
                console.print(f"{name}: {count} {kind} at {line}{where}", highlight=False)


def _device(step: Step) -> Sequence[str]:
    if step.device is None or step.forward_device is None:
        return [""] * 5
    totals = {name: sum(found.values()) for name, found in step.device.items()}
    inside = {name: sum(found.values()) for name, found in step.forward_device.items()}
    said = f"{inside['programs']} + {inside['operations']}, {inside['sends']} sends, {inside['reads']} reads"
    return [*(str(totals[name]) for name in ("programs", "operations", "sends", "reads")), said]


if __name__ == "__main__":
    main()
