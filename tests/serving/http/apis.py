"""The API over tiny backbones, as every test of it begins; what a test is about it replaces."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from polygraft.cluster.model import Backbone as Record
from polygraft.cluster.model import Limits, TenantId
from polygraft.cluster.settings import LimitSettings
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, Write
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.serving.adoption import Adoption
from polygraft.serving.candidate import candidate
from polygraft.serving.gateway import Gateway
from polygraft.serving.http.context import Api
from polygraft.serving.http.known import Backbones, KnownBackbone
from polygraft.serving.http.meters import Meters
from polygraft.serving.http.overview import Overview
from polygraft.tuning.desk import Desk

OWN = "tiny"


def known(
    record: Record, backbone: Backbone, gateway: Gateway, adoption: Adoption, *, max_context: int = 512
) -> KnownBackbone:
    return KnownBackbone(
        record=record,
        tokeniser=Tokeniser.load(backbone.folder),
        shape=backbone.shape,
        files=BackboneFiles(backbone.folder),
        gateway=gateway,
        adoption=adoption,
        max_context=max_context,
    )


def record_of(name: str, backbone: Backbone) -> Record:
    """Added and asked at the time 1."""
    return Record(
        name=name,
        folder=str(backbone.folder),
        dtype="fp32",
        quantise=None,
        fingerprint=backbone.fingerprint,
        context_length=backbone.shape.positions or None,
        added_at=1.0,
        asked_at=1.0,
    )


def knowing(api: Api, backbone: KnownBackbone) -> Api:
    """The same, but for what it knows of its one backbone."""
    backbones = Backbones(api.store, lambda _: backbone, default=backbone.name)
    backbones._started.update(api.backbones._started)  # its gateway, where it is the same, is not started twice
    return replace(api, backbones=backbones)


def tiny_api(
    store: Store, gateway: Gateway, backbone: Backbone, data: Path, adoption: Adoption, *, max_context: int = 512
) -> Api:
    """Of one backbone, `OWN`."""
    store.commit(
        [Write(keys.backbone(OWN), record_of(OWN, backbone), 0)]
    )  # without an event: what tests count is theirs
    backbones = Backbones(
        store, lambda record: known(record, backbone, gateway, adoption, max_context=max_context), default=OWN
    )
    backbones.look()
    return Api(
        store=store,
        backbones=backbones,
        data=data,
        graft_roots=(),
        candidate=lambda source, quantise: candidate(source, data, quantise),
        limits=LimitSettings(),
        pack=lambda _: Limits(),
        clock=time.time,
        desk=Desk(),
        meters=Meters("i0"),
        overview=Overview(store, time.time),
        metrics_tenants=frozenset({TenantId("ann")}),
    )
