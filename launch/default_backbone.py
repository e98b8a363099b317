"""The backbone that the settings name, which a service has from its first moment on."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from polygraft.cluster.backbones import put_backbone
from polygraft.cluster.model import Backbone, Device
from polygraft.cluster.settings import Settings
from polygraft.cluster.sizing import sizes
from polygraft.cluster.store.connect import connect
from polygraft.grafts.runtime.checked import BackboneError
from polygraft.serving.candidate import candidate


def put_default(settings: Settings, cache: Path, devices: Collection[Device]) -> Backbone:
    """Have its files made where they are not there yet, and its record written, with sizes for these devices; it counts
    as asked, so that it is loaded at once. Raises BackboneError and DoesNotFit."""
    found = candidate(settings.backbone, cache, settings.quantise)
    if not found.decodes:
        wanted = "the service's own is to answer; give a causal language model, and add encoders to it"
        raise BackboneError(f"backbone: {found.folder} is an encoder; {wanted}")
    now = time.time()
    record = found.backbone(settings.backbone, dtype=settings.dtype, quantise=settings.quantise, at=now, asked=True)
    record = replace(record, sizes=sizes(settings, record, devices))
    with closing(connect(settings.store_url)) as store:
        return put_backbone(store, record, at=now)
