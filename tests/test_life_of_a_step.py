"""docs/life-of-a-step.md names functions in the order in which data meets them: two steps are run, and compared.

To follow one in a debugger: `python -m pytest tests/test_life_of_a_step.py -k decoding --trace`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType

import pytest
import torch

from polygraft.cluster.model import GraftId
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.serving.engine import Engine
from polygraft.trainers.job import Sample, TrainConfig, TrainJob
from polygraft.trainers.runner import PackRunner
from tests.compiled import compiled
from tests.serving.engines import engine_on, request, run
from tests.serving.naive import random_tensors
from tests.tiny import tiny_llama

PAGE = Path(__file__).parents[1] / "docs" / "life-of-a-step.md"
GRAFTS = ("lora(r=4)", "serial(8)", "prefix(3)")
_STOP = re.compile(r"^ *\d+\. `([a-z0-9_/]+)\.py:([\w.]+)`", re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(folder: Path, tmp_path: Path) -> Iterator[Engine]:
    """Not started."""
    engine = engine_on(Backbone.load(folder, torch.float32), tmp_path)
    yield engine
    engine.stop()


@compiled
def test_a_decoding_step_meets_the_functions_of_the_page_in_its_order(engine: Engine, tmp_path: Path) -> None:
    ask(engine, tmp_path, GRAFTS)
    with following("A decoding step") as judge:
        run(engine)
    judge()


def test_a_forward_by_the_modules_meets_the_functions_of_the_page_in_its_order(engine: Engine, tmp_path: Path) -> None:
    ask(engine, tmp_path, (*GRAFTS, "ia3"))
    with following("The same forward by the modules") as judge:
        run(engine)
    judge()


def test_a_packed_training_step_meets_the_functions_of_the_page_in_its_order(folder: Path) -> None:
    runner = PackRunner(Backbone.load(folder, torch.float32, training=True))
    samples = (Sample((3, 4, 5, 6), (0.0, 0.0, 1.0, 1.0)),) * 2
    for number, text in enumerate(GRAFTS):
        config = TrainConfig(epochs=2, batch_size=2, learning_rate=1e-3, seed=number)
        runner.admit(TrainJob(text, BoundGraft(parse(text), runner.backbone.shape), config, samples))
    runner.step()  # which stacks them
    with following("A packed training step") as judge:
        runner.step()
    judge()


def ask(engine: Engine, data: Path, texts: Sequence[str]) -> None:
    """Save a graft for each text, let each answer alone, so that all are in memory, and submit a request for each."""
    backbone = engine._backbone
    grafts: list[GraftId] = []
    for number, text in enumerate(texts):
        graft = BoundGraft(parse(text), backbone.shape)
        saved = native.save(data / "grafts", graft, random_tensors(graft, number), backbone=backbone.fingerprint)
        grafts.append(GraftId(saved))
        engine.submit(request(text, (5, 6, 7), graft=grafts[-1], max_tokens=1))
        run(engine)
    for graft_id in grafts:
        engine.submit(request(graft_id, (5, 6, 7), graft=graft_id, max_tokens=2))


@contextmanager
def following(section: str) -> Iterator[Callable[[], None]]:
    """Inside, calls are watched; what it gives then says whether they first came in the order of the page's section."""
    names = [f"{path}.py:{name}" for path, name in _STOP.findall(_section(section))]
    codes = {_code(name): name for name in names}
    met: dict[str, None] = {}

    def see(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and (name := codes.get(frame.f_code)) is not None:
            met.setdefault(name)

    def judge() -> None:
        assert names, f"{section!r} lists no function"
        assert list(met) == names

    sys.setprofile(see)
    try:
        yield judge
    finally:
        sys.setprofile(None)


def _section(title: str) -> str:
    return PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def _code(name: str) -> CodeType:
    path, _, inner = name.partition(".py:")
    found = import_module("polygraft." + path.replace("/", "."))
    for part in inner.split("."):
        found = getattr(found, part)
    return inspect.unwrap(found).__code__  # type: ignore[arg-type]
