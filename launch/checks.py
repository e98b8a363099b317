"""What `polygraft doctor` looks at: each check says what it found, and what to do where something is wrong."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from polygraft.cluster.service import ServiceNotRunning, find_service
from polygraft.cluster.settings import Settings
from polygraft.launch.cache import backbone_cache
from polygraft.launch.ports import PortTaken, check_free
from polygraft.launch.processes import Identity

Verdict = Literal["ok", "note", "bad"]
_DISK_BYTES = 2 << 30
_PACKAGES = ("ray", "torch", "transformers", "triton", "bitsandbytes", "redis", "optuna")


@dataclass(frozen=True, slots=True)
class Finding:
    """`bad` keeps the service from working; a `note` does not."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


Look = Callable[[Settings], Finding]


def examine(settings: Settings) -> Iterator[Finding]:
    """Every check in turn; the ones that import torch come late."""
    for look in (_python, _packages, _valkey, _disk, _backbone, _port, _service, _threads, _device, _products):
        try:
            yield look(settings)
        except Exception as error:  # a check that breaks is a finding too, and the others are still of use
            yield Finding(look.__name__.strip("_"), "bad", f"{type(error).__name__}: {error}")


def _python(_: Settings) -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding(
        "python", "ok" if good else "bad", sys.version.split()[0], "" if good else "use Python 3.11 or later"
    )


def _packages(_: Settings) -> Finding:
    found, missing = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    advice = f"install {', '.join(missing)}: make setup" if missing else ""
    return Finding("packages", "bad" if missing else "ok", ", ".join(found), advice)


def _valkey(settings: Settings) -> Finding:
    if settings.store_url != "embedded":
        return Finding("store", "ok", "one of your own, by store_url")
    from polygraft.cluster.store.embedded import find_server

    return Finding("store", "ok", find_server())


def _disk(settings: Settings) -> Finding:
    folder = next(path for path in (settings.data, *settings.data.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    advice = (
        ""
        if free >= _DISK_BYTES
        else f"at least {_DISK_BYTES / 2**30:.0f} GiB are wanted for backbones, checkpoints and grafts"
    )
    return Finding("disk", "note" if advice else "ok", f"{free / 2**30:.1f} GiB free at {folder}", advice)


def _backbone(settings: Settings) -> Finding:
    known = (Path(settings.backbone).expanduser(), backbone_cache() / settings.backbone.replace("/", "--"))
    folder = next((path for path in known if (path / "config.json").is_file()), None)
    if folder is not None:
        return Finding("backbone", "ok", f"{settings.backbone} at {folder}")
    return Finding(
        "backbone",
        "note",
        f"{settings.backbone} is not prepared yet",
        "the first up does it, which takes about a minute",
    )


def _port(settings: Settings) -> Finding:
    if _is_up(settings):
        return Finding("port", "ok", "the running service has it")
    if settings.port == 0:
        return Finding("port", "ok", "any free one")
    try:
        check_free(settings.host, settings.port)
    except PortTaken as error:
        found, _, advice = str(error).removeprefix("port: ").partition("; ")
        return Finding("port", "bad", found, advice)
    return Finding("port", "ok", f"{settings.host}:{settings.port} is free")


def _service(settings: Settings) -> Finding:
    if not _is_up(settings):
        return Finding("service", "note", f"not running under {settings.home}", "start it with: polygraft up")
    import httpx

    service = find_service(settings.service_path)
    try:
        healthy = httpx.get(f"{service.url}/healthz", timeout=5.0, trust_env=False).is_success
    except httpx.TransportError:
        healthy = False
    log = settings.home / "run" / "head.log"
    return Finding(
        "service",
        "ok" if healthy else "bad",
        f"{service.url}, pid {service.pid}",
        "" if healthy else f"it does not answer; see {log}",
    )


def _threads(_: Settings) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = os.environ.get("OMP_NUM_THREADS")
    advice = (
        f"the service uses all {cores} cores whatever OMP_NUM_THREADS says here" if told and told != str(cores) else ""
    )
    return Finding("threads", "note" if advice else "ok", f"{cores} cores, OMP_NUM_THREADS {told or 'not set'}", advice)


def _device(settings: Settings) -> Finding:
    import torch

    from polygraft.grafts.runtime.backbone import best_dtype
    from polygraft.grafts.runtime.process import chosen_device

    device = chosen_device(settings.device)  # raises where it is asked for and not here
    fast = best_dtype(device) is torch.bfloat16
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    found = f"{name}, bf16 {'yes' if fast else 'no'} (device: {settings.device})"
    advice = "" if fast else "it has no bf16 arithmetic; dtype auto means fp32 here"
    return Finding("device", "ok" if fast else "note", found, advice)


def _products(_: Settings) -> Finding:
    from polygraft.kernels.compiled.build import Unavailable, build
    from polygraft.kernels.dense.library import SOURCE, load

    try:
        load(path := build(SOURCE))
        return Finding("products", "ok", f"compiled for this CPU: {path}")
    except Unavailable as error:
        return Finding("products", "ok", f"torch's: {error}")


def _is_up(settings: Settings) -> bool:
    try:
        service = find_service(settings.service_path)
    except ServiceNotRunning:
        return False
    return Identity(service.pid, service.started).alive()
