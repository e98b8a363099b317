"""submit, jobs, logs, cancel: fine-tuning jobs by hand."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from pydantic import JsonValue
from rich.markup import escape

from polygraft.cluster import searches as remote
from polygraft.cluster.answers import JobEvent, RemoteDryRun, RemoteJob
from polygraft.cluster.client import Client
from polygraft.launch.commands.common import Json, flags
from polygraft.launch.commands.request import TYPE, read_request
from polygraft.launch.output import Failure, Status, ago, count, loss, print_json, print_table, screen
from polygraft.launch.progress import job_progress

_COLORS = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}
_FOLLOW_S = 1.0


def register(app: typer.Typer) -> None:
    app.command()(submit)
    app.command()(jobs)
    app.command()(logs)
    app.command()(cancel)


def submit(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(help="Chat examples as JSONL, or a YAML file with training_file and the names below.")
    ],
    model: Annotated[str | None, typer.Option(help="The backbone; the service's own when not given.")] = None,
    peft: Annotated[
        str | None, typer.Option(help='The graft, such as "lora(r=8) + prefix(10)"; see polygraft methods.')
    ] = None,
    type: Annotated[
        str | None, typer.Option(help="supervised (the default), or classification of labelled texts, JSONL or TSV.")
    ] = None,
    found: Annotated[
        str | None, typer.Option("--from", help="Graft and learning rate that this search chose, for these data.")
    ] = None,
    validation_file: Annotated[Path | None, typer.Option(help="Held-out examples as JSONL.")] = None,
    test_file: Annotated[
        Path | None, typer.Option(help="Others, on which the graft is judged once, after training.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Name of the graft: the model becomes SUFFIX@1.")] = None,
    n_epochs: Annotated[int | None, typer.Option("--n-epochs", "--epochs")] = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="The method's own when not given.")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="linear, constant or cosine.")] = None,
    warmup_ratio: Annotated[float | None, typer.Option()] = None,
    weight_decay: Annotated[float | None, typer.Option()] = None,
    max_grad_norm: Annotated[float | None, typer.Option()] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens kept of an example; all that there is room for when not given.")
    ] = None,
    dropout: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Let the bare name mean the new version.")] = False,
    priority: Annotated[
        int | None, typer.Option(help="Of two of your jobs that wait, the higher goes first; -10 to 10.")
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Devices that share each of its steps.")] = None,
    until: Annotated[float | None, typer.Option(help="End after this share of the steps, and keep the state.")] = None,
    after: Annotated[str | None, typer.Option(help="Go on from the state of this job, which ended earlier.")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Do not wait for the job's end.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the job would be and what it would cut; make nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a graft on a file of chat examples."""
    given: dict[str, JsonValue] = {
        "model": model,
        "peft": peft,
        TYPE: type,
        "validation_file": str(validation_file) if validation_file else None,
        "test_file": str(test_file) if test_file else None,
        "suffix": suffix,
        "n_epochs": n_epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup_ratio": warmup_ratio,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "max_length": max_length,
        "dropout": dropout,
        "seed": seed,
        "promote": promote or None,
        "priority": priority,
        "devices": devices,
        "rung": {name: one for name, one in (("until", until), ("after", after)) if one is not None} or None,
    }
    if found is not None:
        with flags(context).client() as client:
            given |= {name: value for name, value in found_by(client, found).items() if given[name] is None}
    request = read_request(file, {name: value for name, value in given.items() if value is not None})
    if dry_run:
        with flags(context).client() as client:
            _print_dry_run(request.dry_run(client), as_json=as_json)
        return
    with flags(context).client() as client:
        job = client.create_job(request.body(client))
        if not detach:
            if not as_json:
                screen.print(f"{job.id} is submitted; Ctrl-C stops waiting, not the job", highlight=False)
            job = _wait(client, job, quiet=as_json)
    if as_json:
        print_json(job)
    elif job.final:
        _print_job(job)
    else:
        screen.print(f"{job.id}\nFollow it with: polygraft logs {job.id} --follow", highlight=False)
    if job.status in ("failed", "cancelled"):
        raise Failure(f"{job.id} {job.status}: {job.error.message if job.error else 'see polygraft story'}")


def found_by(client: Client, search: str) -> dict[str, JsonValue]:
    """Graft and learning rate of the trial that a search chose, or else of the lowest loss on its front, to be trained
    on other data (AutoPEFT's transfer, Zhou et al. 2024, section 5)."""
    found = remote.show(client, search)
    trials = {trial.number: trial for trial in remote.trials(client, search)}
    front = [trials[number] for number in found.front if trials[number].loss is not None]
    if found.chosen is None and not front:
        raise Failure(f"--from: {search} is {found.status} and found nothing", Status.USAGE)
    best = min(front, key=lambda trial: (trial.loss, trial.number)) if found.chosen is None else trials[found.chosen]
    return {"peft": best.candidate.peft, "learning_rate": best.candidate.learning_rate}


def jobs(
    context: typer.Context,
    job: Annotated[str | None, typer.Argument(help="One job; all when not given.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(help="At most this many, the newest.", min=1)] = 50,
    as_json: Json = False,
) -> None:
    """List the jobs, or show one."""
    with flags(context).client() as client:
        if job is not None:
            found = client.job(job)
            if as_json:
                print_json(found)
            else:
                _print_job(found)
            return
        listed = list(client.jobs(limit))
    if as_json:
        print_json(iter(listed))
        return
    several = len({one.model for one in listed}) > 1  # backbones
    print_table(
        (
            "job",
            "status",
            *(["backbone"] if several else []),
            "method",
            "#steps",
            "#parameters",
            "#loss before",
            "#after",
            "#score",
            "model",
            "#age",
        ),
        (
            (
                one.id,
                _colored(one.status),
                *([escape(one.model)] if several else []),
                escape(one.peft),
                _steps(one),
                count(one.parameters),
                loss(one.loss_before),
                loss(one.loss_after),
                loss(one.score),
                one.fine_tuned_model,
                ago(one.created_at),
            )
            for one in listed
        ),
        empty="no jobs yet; start one with: polygraft submit FILE",
    )


def logs(
    context: typer.Context,
    job: str,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more until the job has ended.")] = False,
    limit: Annotated[int, typer.Option(help="Begin with at most this many, the newest.", min=1)] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Show what a job has said and measured."""
    with flags(context).client() as client:
        last = None
        while True:
            final = client.job(job).final  # looked at before the events, so that none of the last ones is missed
            for event in _news(client, job, last, limit):
                _print_event(event, as_json=as_json)
                last = event.id
            if final or not follow:
                return
            time.sleep(_FOLLOW_S)


def cancel(context: typer.Context, job: str, as_json: Json = False) -> None:
    """Stop a job; its place in the pack is free at the next step."""
    with flags(context).client() as client:
        found = client.cancel(job)
    if as_json:
        print_json(found)
    else:
        screen.print(
            f"{found.id}: {'cancelled' if found.status == 'cancelled' else 'will stop at the next step'}",
            highlight=False,
        )


def _wait(client: Client, job: RemoteJob, *, quiet: bool) -> RemoteJob:
    if quiet:
        return client.wait(job.id)
    with job_progress() as progress:
        task = progress.add_task(job.id, total=None, note="")

        def show(seen: RemoteJob) -> None:
            progress.update(task, total=seen.steps_total, completed=seen.step, note=seen.status)

        return client.wait(job.id, show)


def _news(client: Client, job: str, last: str | None, limit: int) -> list[JobEvent]:
    """Events after `last`, oldest first."""
    found: list[JobEvent] = []
    for event in client.events(job, limit=limit if last is None else None):
        if event.id == last:
            break
        found.append(event)
    return found[::-1]


def _print_event(event: JobEvent, *, as_json: bool) -> None:
    if as_json:
        typer.echo(event.model_dump_json())
        return
    color = {"warn": "yellow", "error": "red"}.get(event.level, "dim")
    at = datetime.fromtimestamp(event.created_at).strftime("%H:%M:%S")
    screen.print(f"[dim]{at}[/] [{color}]{event.level:5}[/] {escape(event.message)}", highlight=False, soft_wrap=True)


def _print_dry_run(found: RemoteDryRun, *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    rows = {
        "model": found.model,
        "method": escape(found.peft),
        "parameters": found.parameters,
        "learning rate": found.learning_rate,
        "max length": "no limit" if found.max_length is None else found.max_length,
        "steps": found.steps,
    }
    for name, file in found.files.items():
        part = "" if file.complete else "at least "
        rows[name.replace("_", " ")] = (
            f"{part}{file.examples} examples, {part}{file.tokens} tokens, {file.trained_tokens} of them trained; "
            f"the longest has {file.longest}"
        )
        rows[f"{name.split('_')[0]} cut"] = file.warning or "nothing"
    print_table((), ((f"[bold]{name}[/]", value) for name, value in rows.items() if value is not None), empty="")


def _print_job(job: RemoteJob) -> None:
    rows = {
        "job": job.id,
        "status": _colored(job.status),
        "error": escape(job.error.message) if job.error else None,
        "model": job.fine_tuned_model,
        "backbone": job.model,
        "method": escape(job.peft),
        "parameters": job.parameters,
        "steps": _steps(job),
        "trained tokens": job.trained_tokens,
        "held-out loss": f"{loss(job.loss_before)} -> {loss(job.loss_after) or '...'}"
        if job.loss_before is not None
        else None,
        **{name.replace("_", " "): value for name, value in _judged(job).items()},
        "pack": job.pack,
        "submitted": f"{ago(job.created_at)} ago",
        "took": f"{job.finished_at - job.started_at} s" if job.finished_at and job.started_at else None,
    }
    print_table((), ((f"[bold]{name}[/]", value) for name, value in rows.items() if value is not None), empty="")


def _judged(job: RemoteJob) -> dict[str, str]:
    """Scores before and after, and what the test file said."""
    found = {}
    for name, before in job.scores_before.items():
        after = job.scores_after.get(name)
        found[name] = f"{before:.3f} -> {'...' if after is None else f'{after:.3f}'}"
    if job.test_loss is not None:
        found["test_loss"] = loss(job.test_loss) or ""
    return found | {f"test_{name}": f"{value:.3f}" for name, value in job.test_scores.items()}


def _steps(job: RemoteJob) -> str:
    return f"{job.step}/{job.steps_total if job.steps_total is not None else '?'}"


def _colored(status: str) -> str:
    return f"[{_COLORS[status]}]{status}[/]" if status in _COLORS else status
