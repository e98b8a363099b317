"""From a job's record and its tenant's files to what a pack trains: parse the graft, read and tokenise the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from polygraft.cluster.model import FileId, Job
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.heads import head_over, label_of
from polygraft.grafts.formats.peft_config import asked_for
from polygraft.grafts.grammar import learning_rate
from polygraft.grafts.head import Head
from polygraft.grafts.spec import Branch, GraftSpec
from polygraft.grafts.text.jsonl import read, read_labelled_texts
from polygraft.grafts.text.lengths import Lengths
from polygraft.grafts.text.tokenise import Tokeniser, Tokens
from polygraft.trainers.job import Question, Sample, TrainConfig, TrainJob
from polygraft.trainers.readings import Reading, Readings

TRAINING = "training_file"


class FileGone(ValueError):
    """A file of the job whose content is not there; `param` is the field that names it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def prepare(  # noqa: PLR0913
    job: Job,
    *,
    files: Path,
    tokeniser: Tokeniser,
    backbone_files: BackboneFiles,
    micro_rows: int,
    longest: Callable[[BoundGraft], int | None] = lambda graft: None,
    readings: Readings | None = None,
) -> TrainJob:
    """Examples of a job that does not say `max_length` are cut to what the positions and `longest` (tokens, by its
    graft) have room for; what is in `readings` is not read again. Raises SpecError, DataError or FileGone (all
    ValueError) that name the field or the line."""
    shape, classifies = backbone_files.shape, job.spec.kind == "classification"
    spec = with_dropout(asked_for(job.spec.peft, shape, backbone_files, classifies=classifies), job.spec.dropout)
    if classifies:
        spec = replace(spec, head=head_over(files / f"{job.spec.training_file}.jsonl", shape))
    graft = BoundGraft(spec, shape)
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
    given = {
        TRAINING: job.spec.training_file,
        "validation_file": job.spec.validation_file,
        "test_file": job.spec.test_file,
    }
    known = Readings() if readings is None else readings
    found = {
        name: _samples(name, files, file, graft.spec.head, tokeniser, limit, known) for name, file in given.items()
    }
    warnings = {name: one.lengths.warning(limit) for name, one in found.items()}
    return TrainJob(
        id=job.id,
        graft=graft,
        config=config,
        train=found[TRAINING].samples,
        held_out=found["validation_file"].samples,
        test=found["test_file"].samples,
        warnings=tuple(f"{name}: {text}" for name, text in warnings.items() if text is not None),
    )


def with_dropout(spec: GraftSpec, rate: float | None) -> GraftSpec:
    """The spec with `rate` on every branch; None leaves what the slots say."""
    if rate is None:
        return spec
    return replace(spec, slots=tuple(replace(s, dropout=rate) if isinstance(s, Branch) else s for s in spec.slots))


def _samples(  # noqa: PLR0913
    name: str,
    files: Path,
    file: FileId | None,
    head: Head | None,
    tokeniser: Tokeniser,
    limit: int | None,
    readings: Readings,
) -> Reading:
    """The samples of the file, if there is one, and what the limit leaves out of them."""
    if file is None:
        return Reading()
    path, encode = files / f"{file}.jsonl", partial(_labelled, head) if head else _chat
    how = name == TRAINING, head, limit
    try:
        return readings.of(path, how, lambda: _read(encode(path, name, tokeniser, limit)))
    except FileNotFoundError:  # it was deleted just before there was a job that needs it
        raise FileGone(name, f"{name}: the content of {file} is gone; upload it again") from None


def _read(found: Iterable[tuple[Sample, Tokens]]) -> Reading:
    samples, lengths = [], Lengths()
    for sample, tokens in found:
        samples.append(sample)
        lengths = lengths.plus(tokens)
    return Reading(tuple(samples), lengths)


def _chat(file: Path, name: str, tokeniser: Tokeniser, limit: int | None) -> Iterator[tuple[Sample, Tokens]]:
    """What is trained on are right choices alone; what is judged has the others, too."""
    for example in read(file):
        tokens = tokeniser.encode_example(example, limit)
        others = () if name == TRAINING else tokeniser.encode_others(example, limit)
        question = None
        if others:
            wrong = tuple(Sample(one.ids, one.weights) for one in others)
            question = Question(example.choices, example.answer, wrong)
        yield Sample(tokens.ids, tokens.weights, question), tokens


def _labelled(
    head: Head, file: Path, name: str, tokeniser: Tokeniser, limit: int | None
) -> Iterator[tuple[Sample, Tokens]]:
    for example in read_labelled_texts(file):
        label = label_of(head, example)
        tokens = tokeniser.encode_labelled(example, limit, last=head.reads_last)
        yield Sample.labelled(tokens.ids, label, head), tokens
