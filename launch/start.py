"""Starts a service: leaves a supervisor behind and waits until the API answers."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TextIO

import httpx

from polygraft.cluster.service import Service, ServiceNotRunning, find_service, write_private
from polygraft.cluster.settings import Settings
from polygraft.cluster.store.appendonly import cut_damaged
from polygraft.cluster.store.base import StoreError
from polygraft.grafts.runtime.pretrained import folder_named
from polygraft.kernels.common.atomic import move
from polygraft.launch.output import Failure
from polygraft.launch.ports import PortTaken, claimed
from polygraft.launch.preflight import obstacles
from polygraft.launch.run_folder import RunFolder

_POLL_S = 0.2
_LOGS = ("head", "supervisor")


class AlreadyRunning(Exception):
    """A service is up, or coming up, under this home folder."""


class StartFailed(Failure):
    """The service did not come up; the message says why in its first line."""


def start(
    settings: Settings,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    timeout_s: float = 300.0,
    cut_store: bool = False,
) -> Service:
    """The service, once it answers. Raises AlreadyRunning, StartFailed; nothing is left behind then, nor after
    Ctrl-C. `cut_store`: of a damaged file of the store, use what is before the damage."""
    folder = RunFolder(settings.home)
    if (local := folder_named(settings.backbone)) is not None:  # the service runs in another folder than the caller
        settings = settings.model_copy(update={"backbone": str(local.absolute())})
    try:
        what = "home"
        for path in (settings.home, folder.path, settings.store_folder):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        what = "data"
        settings.data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartFailed(f"{what}: {error.filename}: {error.strerror}; choose another folder with --{what}") from None
    with open(folder.path / "starting", "w") as alone:
        try:
            fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AlreadyRunning(settings.home) from None
        if running(settings):
            raise AlreadyRunning(settings.home)
        folder.clear()
        on_stage("looking at the machine")
        if (reason := next(obstacles(settings), None)) is not None:
            raise StartFailed(reason)
        try:
            if cut_store and (cut := cut_damaged(settings.store_folder)) is not None:
                folder.note(f"cut off {cut}, as asked; they are kept in {cut.kept}")
            with claimed(settings.host, settings.port, settings.home) as (port, claim):
                settings = settings.model_copy(update={"port": port})
                return _start(settings, folder, claim, on_stage, time.monotonic() + timeout_s)
        except (PortTaken, StoreError) as error:
            raise StartFailed(str(error)) from None


def running(settings: Settings) -> bool:
    """Whether a supervisor owns the home folder, ready or not."""
    last = RunFolder(settings.home).supervision
    return last is not None and last.supervisor.alive()


def _start(
    settings: Settings, folder: RunFolder, claim: TextIO, on_stage: Callable[[str], None], deadline: float
) -> Service:
    write_private(folder.settings, settings.told)
    for name in _LOGS:
        if folder.log(name).exists():
            move(folder.log(name), folder.log(f"{name}.old"))
    settings.service_path.unlink(missing_ok=True)
    folder.enter("starting")
    with folder.log("supervisor").open("ab") as log:
        supervisor = subprocess.Popen(
            (sys.executable, "-m", "polygraft.launch.supervisor", str(folder.settings)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=settings.home,
            start_new_session=True,
            pass_fds=[claim.fileno()],  # the port is claimed as long as the supervisor lives
        )
    try:
        return _wait(settings, folder, supervisor, on_stage, deadline)
    except BaseException:
        supervisor.terminate()
        supervisor.wait()
        raise


def _wait(
    settings: Settings,
    folder: RunFolder,
    supervisor: subprocess.Popen[bytes],
    on_stage: Callable[[str], None],
    deadline: float,
) -> Service:
    while time.monotonic() < deadline:
        if supervisor.poll() is not None:
            raise StartFailed(_why(folder))
        on_stage(folder.stage)
        try:
            service = find_service(settings.service_path)
            if httpx.get(f"{service.url}/healthz", timeout=5.0, trust_env=False).is_success:
                return service
        except (ServiceNotRunning, httpx.TransportError):
            pass
        time.sleep(_POLL_S)
    raise StartFailed(f"the service was not up in time; it was busy with: {folder.stage}\n{_tails(folder)}")


def _why(folder: RunFolder) -> str:
    """One line where the service itself said why it ended, else what it was busy with and its log."""
    if reason := folder.reason:
        return f"the service did not start: {reason} (more in {folder.path})"
    return f"the service did not start: {folder.stage}\n{_tails(folder)}"


def _tails(folder: RunFolder) -> str:
    """The end of the log that has most to say: the head's if it wrote one."""
    for name in _LOGS:
        if tail := folder.tail(name):
            return f"{tail}\n(from {folder.log(name)})"
    return f"the logs in {folder.path} are empty"
