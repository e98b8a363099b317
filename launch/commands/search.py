"""search: find good grafts for some data, many trials in one pack."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polygraft.cluster.api_keys import verify_key
from polygraft.cluster.model import FileId, StudyId
from polygraft.cluster.service import find_service, read_key
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store
from polygraft.launch.commands.common import Flags, Json, flags
from polygraft.launch.output import Failure, Status, errors, print_json, screen

if TYPE_CHECKING:  # imported when the command runs: Optuna and Ray take seconds
    from polygraft.launch.commands.search_file import SearchFile
    from polygraft.tuning.driver import StudyResult


def register(app: typer.Typer) -> None:
    app.command()(search)


def search(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(help="YAML with name, training_file, validation_file, trials, hyperparameters, ...")
    ],
    study: Annotated[str | None, typer.Option(help="Go on with this study instead of beginning one.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw the front to this PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Search serial x parallel x prefix sizes x layers x learning rate for low loss and few parameters."""
    from polygraft.launch.commands.search_file import read_search_file
    from polygraft.launch.front import Point, print_front
    from polygraft.tuning.front import draw

    wanted = read_search_file(file)
    found = _run(flags(context), wanted, study)
    trials, front = found.trials, [Point.of(trial) for trial in found.front]
    if not front:
        raise Failure(found.ended or "no trial has finished; polygraft jobs says why")
    if found.ended:
        errors.print(found.ended, highlight=False)
    if chart is not None:
        draw(trials, chart, front=found.front, title=f"{wanted.name}: {len(trials)} trials")
    if as_json:
        print_json({"trials": len(trials), "front": [point.to_json() for point in front]})
    else:
        print_front(front)
        if chart is not None:
            screen.print(f"Drawn to {chart}", highlight=False)


def _run(given: Flags, wanted: SearchFile, study: str | None) -> StudyResult:
    from polygraft.cluster.spec import BadRequest
    from polygraft.grafts.spec import SpecError
    from polygraft.launch import searching
    from polygraft.launch.search_progress import SearchProgress
    from polygraft.tuning.plan import BadPlan
    from polygraft.tuning.record import BadRecord

    id = StudyId(study) if study else None
    settings = given.settings()
    service = find_service(settings.service_path)
    key = given.key or read_key(settings.api_key_path)
    try:
        name = wanted.model or service.backbone
        with closing(given.store()) as store:
            owner, uploaded = verify_key(store, key), files_of(store, id)
            backbone = store.get(keys.backbone(name))
        if owner is None:
            raise Failure("the API key is unknown or was revoked; polygraft keys create makes one")
        if backbone is None:
            raise Failure(f"model: {name!r} is no backbone here; polygraft backbones list shows them", Status.USAGE)
        shape = searching.shape_of(backbone.value.folder)
        with given.client() as client:
            plan = wanted.plan(client, backbone=name, shape=shape, uploaded=uploaded)
        with SearchProgress(plan.trials) as progress:
            return searching.run(
                service,
                plan,
                key=key,
                tenant=owner.tenant,
                folder=settings.data / "searches",
                study=id,
                on_begin=lambda id: errors.print(f"{id}; go on with it by --study if it is stopped", highlight=False),
                on_trial=progress.on_trial,
                on_progress=progress.on_progress,
            )
    except (BadPlan, BadRequest, BadRecord, SpecError) as error:
        raise Failure(str(error), Status.USAGE) from None


def files_of(store: Store, study: StudyId | None) -> dict[str, str]:
    """The files that a study was begun with, by the digests of their contents: uploaded again they would have other
    ids, and the plan would be another one."""
    from polygraft.tuning.record import begun

    plan = begun(store, study) if study else None
    named = () if plan is None else (plan.job.training_file, plan.job.validation_file)
    found = (store.get(keys.file(FileId(file))) for file in named if file is not None)
    return {one.value.digest: one.value.id for one in found if one is not None}
