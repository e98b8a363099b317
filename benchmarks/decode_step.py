"""One decoding step taken apart, in a process of its own: its time, the Python functions it calls, and the time of each
kind of work."""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import torch
from child import Reply, answer, task
from material import GRAFTS, Material
from transformers.models.llama import modeling_llama

from polygraft.cluster.model import GraftId, ReplicaId, TenantId
from polygraft.cluster.settings import ServeSettings
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.kernels.compiled.calls import Calls
from polygraft.serving.engine import Engine
from polygraft.serving.request import GenerationRequest

WARM, TIMED, TAKEN_APART = 8, 30, 10  # steps; 25 tokens of prompt and these are the contexts of the benchmark's middle
LONGEST = 64
_PATIENCE = 1000  # turns
# Calls of a layer program by part, and functions whose time is a part's, without what those of other parts take inside.
CALLS = {
    "linear": "products",
    "paged": "attention",
    "residual_norm": "norms",
    "rotary": "rotary",
    "swiglu": "silu and product",
}
PARTS = {
    "products": ("kernels.dense.op.linear",),
    "attention": ("grafts.runtime.cache.PagedAttention._over",),
    "norms": ("kernels.residual_norm.op.apply", "grafts.runtime.norms.rms_norm"),
    "silu and product": ("kernels.swiglu.op.swiglu", "grafts.runtime.feedforward.swiglu"),
    "sampling": ("serving.sampling.sample",),
}


class Decoding:
    """Sixteen streams of the material in an engine without a thread: a turn is a step."""

    def __init__(self, folder: str, *, grafts: bool) -> None:
        material = Material.read(folder)
        self._engine = Engine(
            Backbone.load(Path(material.backbone)), ServeSettings(), replica=ReplicaId("profile"), data=Path(folder)
        )
        for stream, prompt in enumerate(material.prompts):
            request = GenerationRequest(
                id=str(stream),
                tenant=TenantId("profile"),
                graft=GraftId(material.grafts[stream % GRAFTS]) if grafts else None,
                prompt_ids=prompt,
                max_tokens=LONGEST,
                temperature=0.0,
            )
            assert self._engine.submit(request) is None, "the engine's queue is full"
        for _ in range(_PATIENCE):
            if self._engine.load.running == len(material.prompts):
                break
            self._engine.turn()
            time.sleep(0.01)  # grafts are read in another thread
        else:
            raise RuntimeError("not all streams run")
        self.steps(WARM)

    def steps(self, count: int) -> float:
        """Seconds of the median step."""
        return median(_seconds(self._engine.turn) for _ in range(count))

    def close(self) -> None:
        self._engine.stop()


def profile(folder: str, *, grafts: bool) -> Reply:
    decoding = Decoding(folder, grafts=grafts)
    try:
        took = decoding.steps(TIMED)
        with _timed_parts() as parts:
            taken = _seconds(lambda: decoding.steps(TAKEN_APART)) / TAKEN_APART
        shares = {name: 1000 * seconds / TAKEN_APART for name, seconds in parts.items()}
        calls, places = _calls(decoding)
    finally:
        decoding.close()
    return {
        "ms": 1000 * took,
        "ms_by_part": {**shares, "everything else": 1000 * taken - sum(shares.values())},
        "python_calls": calls["call"] + calls["c_call"],
        "most_called": dict(places.most_common(25)),
    }


def _calls(decoding: Decoding) -> tuple[Counter[str], Counter[str]]:
    """Of one step: how many functions Python called, its own ("call") and those of C, and its own by name."""
    kinds: Counter[str] = Counter()
    places: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        kinds[event] += 1
        if event == "call":
            places[f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}"] += 1

    sys.setprofile(note)
    decoding.steps(1)
    sys.setprofile(None)
    return kinds, places


@contextmanager
def _timed_parts() -> Iterator[dict[str, float]]:
    """Inside, the functions of PARTS that this checkout has are timed, wherever they were imported to."""
    seconds: dict[str, float] = defaultdict(float)
    inside: list[float] = []  # of each call that is running, what it spent in parts below it
    undo: list[tuple[Any, str, Any]] = []

    def wrapped(function: Callable[..., object], part: str) -> Callable[..., object]:
        def timed(*args: object, **options: object) -> object:
            inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                took = time.perf_counter() - start
                seconds[part] += took - inside.pop()
                if inside:
                    inside[-1] += took

        return timed

    def put(owner: object, attribute: str, function: object) -> None:
        undo.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, function)

    def one_by_one(calls: Calls) -> None:
        for call in calls.calls:
            wrapped(call, CALLS[call.name])()

    for part, names in PARTS.items():
        for name in names:
            for owner, attribute, function in _holders(f"polygraft.{name}"):
                put(owner, attribute, wrapped(function, part))
    put(modeling_llama, "apply_rotary_pos_emb", wrapped(modeling_llama.apply_rotary_pos_emb, "rotary"))
    put(Calls, "__call__", one_by_one)
    try:
        yield seconds
    finally:
        for owner, attribute, function in undo:
            setattr(owner, attribute, function)


def _holders(name: str) -> list[tuple[object, str, Callable[..., object]]]:
    """Everywhere that a function or method of our modules can be looked up."""
    path, _, attribute = name.rpartition(".")
    if path in sys.modules:
        found = vars(sys.modules[path]).get(attribute)
        modules = [module for key, module in sys.modules.items() if key.startswith("polygraft")]
        return [(m, key, found) for m in modules for key, value in list(vars(m).items()) if value is found and found]
    module, _, kind = path.rpartition(".")
    owner = vars(sys.modules[module]).get(kind) if module in sys.modules else None
    return [(owner, attribute, vars(owner)[attribute])] if owner and attribute in vars(owner) else []


def _seconds(do: Callable[[], object]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


if __name__ == "__main__":
    torch.set_num_threads(task().threads)
    answer({"profile": lambda: profile(task().folder, grafts=task().kind == "engine")})
