"""An engine whose backbone lies on a GPU computes there: `tests.fake_gpu` has one without values, so that all is known
but the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from polygraft.cluster.model import GraftId
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from tests.fake_gpu import DEVICE, FakeGpu, fake_gpu
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
    assert gpu.reads - reads == 3 and gpu.launches > launches  # which rows are finite, the likeliest, one row to draw
    run(engine)
    assert set(heard.reasons().values()) == {"length"} and len(heard.ends) == len(TEXTS) + 2
    assert engine._streams.cache.data.device == DEVICE
