"""From a job's record and its tenant's files to what a pack trains: parse the graft, read and tokenise the samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from polygraft.cluster.model import FileId, Job
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.peft_config import asked_for
from polygraft.grafts.grammar import learning_rate
from polygraft.grafts.spec import Branch, GraftSpec
from polygraft.grafts.text.jsonl import read
from polygraft.grafts.text.lengths import Lengths
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers.job import Sample, TrainConfig, TrainJob


class FileGone(ValueError):
    """A file of the job whose content is not there; `param` is the field that names it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def prepare(
    job: Job,
    *,
    files: Path,
    tokeniser: Tokeniser,
    stock: BackboneFiles,
    micro_rows: int,
    longest: Callable[[BoundGraft], int | None] = lambda graft: None,
) -> TrainJob:
    """Examples of a job that does not say `max_length` are cut to what the positions and `longest` (tokens, by its
    graft) have room for. Raises SpecError, DataError or FileGone (all ValueError) that name the field or the line."""
    shape = stock.shape
    graft = BoundGraft(with_dropout(asked_for(job.spec.peft, shape, stock), job.spec.dropout), shape)
    limit = shape.length_limit(job.spec.max_length, graft.context_length)
    if job.spec.max_length is None and (room := longest(graft) or 0) > 1:  # with less the memory itself says why
        limit = min(limit or room, room)
    asked = job.spec.learning_rate
    config = TrainConfig(
        epochs=job.spec.epochs,
        batch_size=job.spec.batch_size,
        learning_rate=(learning_rate(graft.spec) if asked is None else asked) * job.spec.learning_rate_multiplier,
        schedule=job.spec.schedule,
        warmup_ratio=job.spec.warmup_ratio,
        weight_decay=job.spec.weight_decay,
        max_grad_norm=job.spec.max_grad_norm,
        seed=job.spec.seed,
        micro_rows=micro_rows,
        until=1.0 if job.spec.rung is None else job.spec.rung.until,
    )
    given = {"training_file": job.spec.training_file, "validation_file": job.spec.validation_file}
    (train, warning), (held_out, other) = (
        _samples(name, files, file, tokeniser, limit) for name, file in given.items()
    )
    told = zip(given, (warning, other), strict=True)
    return TrainJob(
        id=job.id,
        graft=graft,
        config=config,
        train=train,
        held_out=held_out,
        warnings=tuple(f"{name}: {text}" for name, text in told if text is not None),
    )


def with_dropout(spec: GraftSpec, rate: float | None) -> GraftSpec:
    """The spec with `rate` on every branch; None leaves what the slots say."""
    if rate is None:
        return spec
    return replace(spec, slots=tuple(replace(s, dropout=rate) if isinstance(s, Branch) else s for s in spec.slots))


def _samples(
    name: str, files: Path, file: FileId | None, tokeniser: Tokeniser, limit: int | None
) -> tuple[tuple[Sample, ...], str | None]:
    """The samples of the file, if there is one, and what the limit leaves out of them."""
    samples, lengths = [], Lengths()
    try:
        for example in () if file is None else read(files / f"{file}.jsonl"):
            tokens = tokeniser.encode_example(example, limit)
            samples.append(Sample(tokens.ids, tokens.weights))
            lengths = lengths.plus(tokens)
    except FileNotFoundError:  # it was deleted just before there was a job that needs it
        raise FileGone(name, f"{name}: the content of {file} is gone; upload it again") from None
    return tuple(samples), lengths.warning(limit)
