"""An engine whose backbone lies on a GPU computes there: `tests.fake_gpu` has one without values, so that all is known
but the numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
import torch

from polygraft.cluster.model import GraftId
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from tests.fake_gpu import DEVICE, FakeGpu, Watched, fake_gpu
from tests.serving.engines import Heard, engine_on, request, run
from tests.tiny import tiny_llama

TEXTS = (
    "lora(r=4) + ia3",
    "dora(r=2, at=attn.v)",
    "prefix(5)@1",
    "serial(4)",
    "prompt(3)",
    "smop(2, 3)",
    "loreft(r=2)",
    "loha(r=2, at=attn.q)",
    "shira(r=2, at=attn.q) + boft(4, 2, attn.o)",
    "llama-adapter(4)",
    "apt(3)",
    "lpt(3)@1",
)
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as machine:
        yield machine


def test_prefill_and_decoding_of_mixed_grafts_stay_on_the_device(gpu: FakeGpu, tmp_path: Path) -> None:
    backbone = Backbone.load(tiny_llama(tmp_path / "tiny"), torch.float32, device=DEVICE)
    heard, grafts = Heard(), []
    engine = engine_on(backbone, tmp_path, heard=heard, max_rows=256)
    residency = engine._streams.residency
    for text in TEXTS:
        bound = BoundGraft(parse(text), backbone.shape)
        values = initialise(bound, backbone, seed=1, samples=((5, 6, 7, 8),))
        id = native.save(tmp_path / "grafts", bound, values, backbone=backbone.fingerprint)
        grafts.append(GraftId(id))
        residency.admit(residency.fetch(grafts[-1]), grafts)  # read in this thread, which alone has the device
    for graft in (None, *grafts):
        engine.submit(request(str(graft), (5, 6, 7, 8, 9), 3, graft=graft))
    drawn = request("drawn", (3, 4), 3, graft=grafts[0], temperature=1.0, top_p=0.5)
    engine.submit(drawn)
    reads, launches = gpu.reads, gpu.launches
    engine.turn()
    assert gpu.reads - reads == 2 and gpu.launches > launches  # the likeliest tokens, one row to draw
    with gpu.watch() as step:
        engine.turn()
    assert {line.partition(":")[0] for line in step.reads} == {"serving/sampling.py"} and step.reads.total() == 2
    run(engine)
    assert set(heard.reasons().values()) == {"length"} and len(heard.ends) == len(TEXTS) + 2
    assert engine._streams.cache.data.device == DEVICE


def decoding_steps(gpu: FakeGpu, folder: Path, layers: int) -> list[Watched]:
    """What two steps, one after the other, ask of the device in which bare streams and a LoRA's all decode."""
    backbone = Backbone.load(tiny_llama(folder / f"{layers}", layers=layers), torch.float32, device=DEVICE)
    engine, graft = engine_on(backbone, folder), BoundGraft(parse("lora(r=4)"), backbone.shape)
    values = initialise(graft, backbone, seed=1, samples=())
    id = native.save(folder / "grafts", graft, values, backbone=backbone.fingerprint)
    engine._streams.residency.admit(engine._streams.residency.fetch(GraftId(id)), ())
    for stream in range(4):
        engine.submit(request(str(stream), (5, 6, 7), 9, graft=GraftId(id) if stream % 2 else None))
    engine.turn()
    engine.turn()
    steps = []
    for _ in range(2):
        with gpu.watch() as step:
            engine.turn()
        steps.append(step)
    return steps


def test_a_cuda_graph_can_take_a_decoding_step(gpu: FakeGpu, tmp_path: Path) -> None:
    """It takes launches that nothing is sent between and nobody waits for, and that are those of the step before. That
    no shape depends on a value is what a device without values shows."""
    steps = decoding_steps(gpu, tmp_path, layers=2)
    for step in steps:
        assert [kind for kind, _ in groupby(event.kind for event in step.events)] == ["send", "launch", "read"]
        assert [line.partition(":")[0] for line in step.reads.elements()] == ["serving/sampling.py"]
    assert steps[0].events == steps[1].events


def test_what_is_sent_for_a_decoding_step_is_its_rows_alone(gpu: FakeGpu, tmp_path: Path) -> None:
    """Whatever the number of layers: ids, positions, places in the cache, page tables, and the tiles of queries."""
    two, four = (decoding_steps(gpu, tmp_path, layers)[0] for layers in (2, 4))
    assert two.sends == four.sends
    assert _by_file(two) == {
        "grafts/runtime/route.py": 2,
        "grafts/runtime/cache.py": 1,
        "kernels/kv/tiles.py": 3,
    }


def _by_file(step: Watched) -> Counter[str]:
    found: Counter[str] = Counter()
    for line, count in step.sends.items():
        found[line.partition(":")[0]] += count
    return found
