"""A service whose backbone is in NF4: what trains, what serves and what answers agree on which backbone it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from polygraft.cluster.backbones import put_backbone
from polygraft.cluster.model import Occupancy, ReplicaId
from polygraft.cluster.settings import BadSettings, load
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Write
from polygraft.cluster.store.memory import MemoryStore
from polygraft.grafts.runtime.pretrained import fingerprint
from polygraft.launch import packs
from polygraft.serving import host as serving_host
from polygraft.serving import ingress
from polygraft.serving.candidate import candidate
from polygraft.trainers import host
from polygraft.trainers.plan import PackPlan
from tests.cluster.builders import make_device, make_pack
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


def test_packs_replicas_and_the_ingress_have_one_backbone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(home=tmp_path, data=tmp_path, store_url="memory://", quantise="nf4", dtype="fp32")
    plans: list[PackPlan] = []
    monkeypatch.setattr(host, "start_host", plans.append)
    store = MemoryStore()
    monkeypatch.setattr(store, "close", lambda: None)
    monkeypatch.setattr(packs, "connect", lambda _: store)
    settings = settings.model_copy(update={"backbone": str(folder)})
    record = candidate(settings.backbone, tmp_path, settings.quantise).backbone(
        settings.backbone, dtype=settings.dtype, quantise=settings.quantise, at=1.0, asked=True
    )
    put_backbone(store, record, at=1.0)
    device = make_device()
    store.commit([Write(keys.device(device.id), Occupancy(device=device), 0)])
    packs.OpenHost.of(settings)(make_pack(backbone=settings.backbone))
    assert (plans[0].nodes, plans[0].kind, plans[0].cores) == ((device.node,), device.kind, device.cores)
    assert (plans[0].quantise, plans[0].dtype, plans[0].backbone_folder) == ("nf4", "fp32", str(folder))
    plan = serving_host.ReplicaPlan(
        backbone=record,
        store_url=settings.store_url,
        data=tmp_path,
        device=settings.device,
        settings=settings.serve,
        step_floor_s=0.0,
    )
    served = serving_host._engine(plan, ReplicaId("replica-0"))._backbone
    monkeypatch.setattr(ingress, "connect", lambda _: store)
    answering = ingress.Ingress(ingress.IngressPlan(settings=settings, cache=tmp_path))._api.backbones.named(
        str(folder)
    )
    assert answering is not None and answering.quantised
    assert served.fingerprint == answering.fingerprint == record.fingerprint == fingerprint(folder, "nf4")


@pytest.mark.parametrize("asked", ["int3", "loftq", "loftq-0-5", "loftq-16-0", "loftq-16-5x"])
def test_another_quantisation_is_refused(asked: str, tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match="quantise"):
        load(home=tmp_path, quantise=asked)
