"""The demo from start to end: a service of its own, training, search, serving, and what they showed."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAIError

from polygraft.cluster.answers import RemoteJob
from polygraft.cluster.api_keys import create_key
from polygraft.cluster.model import TenantId
from polygraft.cluster.service import Service
from polygraft.cluster.settings import PackSettings, Settings, load
from polygraft.cluster.store.connect import connect
from polygraft.launch import corpus
from polygraft.launch.corpus import Share
from polygraft.launch.demo import search as searching
from polygraft.launch.demo.memory import PeakMemory
from polygraft.launch.demo.plan import JOBS
from polygraft.launch.demo.report import LEAST_GRAFTS, LEAST_METHODS, Report
from polygraft.launch.demo.search import Searched
from polygraft.launch.demo.serve import Answer, Burst, burst, rounds
from polygraft.launch.demo.steps import mixing, packing
from polygraft.launch.demo.train import Tenant, Training, train
from polygraft.launch.output import Failure, screen
from polygraft.launch.progress import job_progress, stages
from polygraft.launch.start import AlreadyRunning, start
from polygraft.launch.stop import stop

REQUESTS, MAX_TOKENS = 24, 32


def demo(settings: Settings, *, chart: Path, keep: bool) -> tuple[Report, Service]:
    """Run all stages on a service that is started for them under `settings.home`, and stopped unless `keep`.

    Raises what the stages raise; the service is stopped then, too.
    """
    began = time.perf_counter()
    try:
        data = corpus.load()
    except corpus.CorpusError as error:
        raise Failure(str(error)) from None
    _exit_on_sigterm()
    with stages() as shown:
        try:
            service = start(settings, on_stage=shown.enter)
        except AlreadyRunning:
            raise Failure(f"a service is running under {settings.home}; stop it with: polygraft down") from None
    done = False
    try:
        with PeakMemory(service.pid) as memory:
            tenants, searcher = _tenants(service, data.tenants, data.search)
            trained = _train(service, tenants)
            searched = _search(service, data.search, searcher, chart)
            answered = _serve(service, trained)
        grafts = mixing(settings.data, answered.began_at, grafts=LEAST_GRAFTS, methods=LEAST_METHODS)
        report = Report(
            training=trained,
            packing=packing(settings.data, frozenset(one.job.id for one in trained.trained)),
            searched=searched,
            burst=answered,
            mixing=grafts,
            peak_memory_bytes=memory.bytes,
            wall_s=time.perf_counter() - began,
        )
        done = True
        return report, service
    finally:
        if not (keep and done):
            with stages() as shown:
                shown.enter("stopping the service")
                stop(settings)


@contextmanager
def demo_home(keep: bool, home: Path | None) -> Iterator[Settings]:
    """The user's own home folder when the service stays up, else one that is gone afterwards, on any free port."""
    # Micro-batches of most jobs' whole batches, and room for all eight: what a step costs is mostly its many small ops.
    pack = PackSettings(max_rows=1536, micro_rows=256)
    if keep:
        yield load(home=home, pack=pack)
        return
    with tempfile.TemporaryDirectory(prefix="polygraft-demo-") as folder:
        yield load(home=folder, data=Path(folder) / "data", port=0, store_url="embedded", pack=pack)


def _tenants(service: Service, shares: tuple[Share, ...], search: Share) -> tuple[list[Tenant], str]:
    """Eight tenants with a new key each, and the key of the ninth, which searches."""
    store = connect(service.store_url)
    try:
        keys = [
            create_key(store, tenant=TenantId(share.name), name="demo", at=time.time())[1]
            for share in (*shares, search)
        ]
    finally:
        store.close()
    return [Tenant(*one) for one in zip(shares, JOBS, keys[:-1], strict=True)], keys[-1]


def _train(service: Service, tenants: list[Tenant]) -> Training:
    _announce("1. Train", f"{len(tenants)} tenants, {len(tenants)} methods, one backbone")
    with job_progress() as progress:
        bars = {
            tenant.key: progress.add_task(f"{tenant.share.name:14} {tenant.plan.label:23}", total=None, note="")
            for tenant in tenants
        }

        told: set[str] = set()

        def show(tenant: Tenant, job: RemoteJob) -> None:
            if job.final and job.id not in told and not progress.console.is_terminal:  # bars are not drawn into a file
                told.add(job.id)
                progress.console.print(f"{tenant.share.name}, {tenant.plan.label}: {_losses(job)}", highlight=False)
            progress.update(bars[tenant.key], total=job.steps_total, completed=job.step, note=_losses(job))

        return train(service.url, service.backbone, tenants, on_progress=show)


def _search(service: Service, share: Share, key: str, chart: Path) -> Searched:
    _announce(
        "2. Search",
        f"{searching.TRIALS} trials on {share.name}, at most {searching.CONCURRENCY} at once, each a job in the pack; "
        "those that fall behind are stopped, the front is trained again, and its knee is served",
    )
    began = time.perf_counter()
    try:
        ended, trials = searching.search(service, share, key=key)
        found = Searched(ended, trials, time.perf_counter() - began, chart)
        found.draw()
    except ValueError as error:  # no trial has finished
        raise Failure(f"search: {error}") from None
    return found


def _serve(service: Service, training: Training) -> Burst:
    """Held-out questions to every graft as its own tenant, and to the bare backbone as the first one."""
    models = [
        (one.job.fine_tuned_model or "", one.tenant.key, [pair.question for pair in one.tenant.share.held_out])
        for one in training.trained
    ]
    models.append((service.backbone, models[0][1], models[0][2]))
    _announce(
        "3. Serve", f"{REQUESTS} streaming chat requests at once over {len(models) - 1} grafts and the bare backbone"
    )
    with job_progress() as progress:
        bar = progress.add_task("answers", total=REQUESTS, note="")

        def show(answer: Answer) -> None:
            progress.update(
                bar,
                advance=1,
                note=f"{answer.model}: {answer.text.strip().splitlines()[0][:50] if answer.text.strip() else ''}",
            )

        try:
            return burst(service.url, rounds(models, REQUESTS), max_tokens=MAX_TOKENS, on_answer=show)
        except OpenAIError as error:
            raise Failure(f"serve: {error}") from None


def _exit_on_sigterm() -> None:
    """Let SIGTERM unwind the stack, so that the service is stopped; a second one does not cut that short."""

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)


def _announce(title: str, note: str) -> None:
    screen.print(f"\n[bold]{title}[/]  [dim]{note}[/]", highlight=False)


def _losses(job: RemoteJob) -> str:
    if job.loss_before is None:
        return job.status
    return f"held-out loss {job.loss_before:.3f}" + (f" -> {job.loss_after:.3f}" if job.loss_after is not None else "")
