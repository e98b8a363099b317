"""The API over a tiny backbone, as every test of it begins; what a test is about it replaces."""

from __future__ import annotations

import time
from pathlib import Path

from polygraft.cluster.model import Limits, TenantId
from polygraft.cluster.settings import LimitSettings
from polygraft.cluster.store.base import Store
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.serving.adoption import Adoption
from polygraft.serving.gateway import Gateway
from polygraft.serving.http.context import Api
from polygraft.serving.http.meters import Meters
from polygraft.serving.http.overview import Overview
from polygraft.tuning.desk import Desk


def tiny_api(store: Store, gateway: Gateway, backbone: Backbone, data: Path, adoption: Adoption) -> Api:
    return Api(
        store=store,
        gateway=gateway,
        tokeniser=Tokeniser.load(backbone.folder),
        shape=backbone.shape,
        backbone="tiny",
        fingerprint=backbone.fingerprint,
        stock=BackboneFiles(backbone.folder),
        quantised=False,
        data=data,
        graft_roots=(),
        adoption=adoption,
        limits=LimitSettings(),
        pack=Limits(),
        max_context=512,
        clock=time.time,
        desk=Desk(),
        meters=Meters("i0"),
        overview=Overview(store, time.time),
        metrics_tenants=frozenset({TenantId("ann")}),
    )
