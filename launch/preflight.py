"""What keeps a service from starting and can be known before anything is started: the backbone, the disk, the memory.
The port is claimed apart (`ports.py`)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from polygraft.cluster.settings import Settings
from polygraft.grafts.runtime.checked import BackboneError, check_kind
from polygraft.grafts.runtime.pretrained import EMBEDDED, check_hub_id, folder_named
from polygraft.kernels.common.room import free_bytes
from polygraft.launch.cache import backbone_cache
from polygraft.launch.machine import PROCESSES_BYTES, Machine
from polygraft.launch.ram import available

HOME_BYTES = 8 << 20  # the store refuses to write with less (cluster/store/watch.py)
SCRATCH_BYTES = 64 << 20  # Ray's logs and sockets
CACHE_BYTES = 512 << 20  # the embedded backbone while it is converted
_LEAST_BYTES = 256 << 20  # of a device beside the backbone's weights
_WIDEST = 2  # float32 in memory of bf16 on disk


def obstacles(settings: Settings) -> Iterator[str]:
    """Each with the setting it is about, what was found, and what to do."""
    yield from _backbone(settings)
    yield from _disk(settings)
    yield from _devices(settings)
    yield from _memory(settings)


def backbone_folder(settings: Settings) -> Path | None:
    """Where the backbone lies, None while it is not on this machine."""
    cached = folder_named(str(backbone_cache() / settings.backbone.replace("/", "--")))
    return folder_named(settings.backbone) or cached


def _backbone(settings: Settings) -> Iterator[str]:
    folder = backbone_folder(settings)
    try:
        if folder is not None:
            check_kind(folder)
        elif settings.backbone != EMBEDDED:
            check_hub_id(settings.backbone)
    except BackboneError as error:
        yield str(error)


def _disk(settings: Settings) -> Iterator[str]:
    wanted = {settings.home: HOME_BYTES, settings.data: HOME_BYTES, Path(tempfile.gettempdir()): SCRATCH_BYTES}
    if settings.backbone == EMBEDDED and backbone_folder(settings) is None:
        wanted[backbone_cache()] = CACHE_BYTES
    for folder, least in wanted.items():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if (free := free_bytes(there)) < least:
            yield f"disk: {free / 2**20:.1f} MiB are free under {there}, at least {least >> 20} are needed; make room"


def _devices(settings: Settings) -> Iterator[str]:
    if settings.devices is not None:
        held = _held(settings) or 0  # by a pack, and by a replica
        if (reason := Machine.here(settings).refusal(settings.devices, 2 * held + _LEAST_BYTES)) is not None:
            yield reason


def _held(settings: Settings) -> int | None:
    """About what the weights take in memory; None while they are not on this machine."""
    if (folder := backbone_folder(settings)) is None:
        return None
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return weights // (4 if settings.quantise else 1) * (_WIDEST if settings.dtype == "fp32" else 1)


def _memory(settings: Settings) -> Iterator[str]:
    """On a CPU, where the weights lie in the memory of this machine."""
    held = _held(settings)
    if held is None or settings.device == "cuda" or Path("/dev/nvidiactl").exists():
        return
    needed = held + settings.serve.kv_bytes + PROCESSES_BYTES
    if (free := available()) < needed:
        yield (
            f"memory: serving {settings.backbone} needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are "
            "available; end other programs, choose a smaller backbone, or lower serve.kv_bytes"
        )
