"""Trains the table in packs, share by share: what is there already is not trained again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import kernels_elsewhere  # noqa: F401
import numpy as np
import torch

from peft_table import backbone as own
from peft_table.table import LOOKS, ROWS, SEEDS, SPACES, Row, Table, drawn
from peft_table.tasks import LONGEST, TABLED, TASKS, TRAINED, Split, samples, split
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.kernels.common.atomic import whole_file
from polygraft.trainers.evaluate import mean_loss
from polygraft.trainers.job import Sample, TrainConfig, TrainJob
from polygraft.trainers.runner import PackRunner

BATCH, EPOCHS = 2, 1  # every example is new to a job, as in a search that is given a budget
PACK = 32  # jobs that share a forward
_ROWS = 32 * BATCH * LONGEST  # of a forward: all jobs ride in each


@dataclass(frozen=True, slots=True)
class Data:
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]

    @property
    def steps(self) -> int:
        return EPOCHS * -(-len(self.train) // BATCH)

    @property
    def looks(self) -> tuple[int, ...]:
        """After which steps a job is validated."""
        return tuple(-(-self.steps * look // LOOKS) for look in range(1, LOOKS + 1))


@dataclass(frozen=True, slots=True)
class Share:
    """A pack: some rows of a space, on one task with one seed."""

    space: str
    task: str
    seed: int
    first: int

    @property
    def file(self) -> str:
        return f"{self.space}-{self.task}-{self.seed}-{self.first}.npz"


def shares() -> Iterator[Share]:
    """All of the table, the first seed's before the second's."""
    for seed in SEEDS:
        for task in TABLED:
            for space in SPACES:
                for first in range(0, ROWS[space], PACK):
                    yield Share(space, task, seed, first)


def make(folder: Path, seconds: float, say: Callable[[str], None], *, backwards: bool = False) -> Table | None:
    """The table when all its shares are there, else None after training some of them for about so many `seconds`; the
    last ones first where another process works `backwards`."""
    began = time.monotonic()
    files = own.make(folder / "backbone")
    missing = [share for share in shares() if not (folder / share.file).exists()][:: -1 if backwards else 1]
    if missing:
        backbone = Backbone.load(files, torch.float32, training=True)
        data = {task: data_of(files, task) for task in TABLED}
        for number, share in enumerate(missing):
            if number and time.monotonic() - began > seconds:
                return None
            if (folder / share.file).exists():
                break  # here another process has come from the other end
            start = time.monotonic()
            _train(backbone, data[share.task], share, folder / share.file)
            say(f"{share.file}: {time.monotonic() - start:.0f} s; {len(missing) - number - 1} to go")
    return _whole(files, folder) if all((folder / share.file).exists() for share in shares()) else None


def data_of(files: Path, task: str) -> Data:
    """The samples of a task, with the tokenizer of the backbone's files."""
    found: Split = split(TASKS[task])
    tokenizer = own.tokenizer_of(files)
    train, validation, test = (samples(tokenizer, pairs) for pairs in (found.train, found.validation, found.test))
    return Data(train[:TRAINED], validation, test)


def _train(backbone: Backbone, data: Data, share: Share, path: Path) -> None:
    rows = drawn(share.space, backbone.shape, ROWS[share.space])[share.first : share.first + PACK]
    training, validation, test = curves(backbone, data, rows, [share.seed] * len(rows))
    with whole_file(path) as draft, draft.open("wb") as file:
        np.savez(file, training=training, validation=validation, test=test)


def curves(
    backbone: Backbone, data: Data, rows: Sequence[Row], seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training losses by (row, step), validation losses by (row, look) and test losses, of one pack of all rows, each
    with its seed; NaN where a job failed."""
    runner = PackRunner(backbone, max_rows=_ROWS)
    for number, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
        config = TrainConfig(
            epochs=EPOCHS, batch_size=BATCH, learning_rate=row.learning_rate, seed=seed, micro_rows=_ROWS
        )
        runner.admit(TrainJob(str(number), BoundGraft(parse(row.peft), backbone.shape), config, data.train))
    training = np.full((len(rows), data.steps), np.nan)
    validation = np.full((len(rows), LOOKS), np.nan)
    test = np.full(len(rows), np.nan)
    while any(not running.finished for running in runner.jobs.values()):
        done = runner.step()
        for stepped in done.stepped:
            place = int(stepped.job)
            training[place, stepped.step - 1] = stepped.loss
            if stepped.step in data.looks:
                validation[place, data.looks.index(stepped.step)] = runner.evaluate(stepped.job, data.validation)
            if stepped.step == data.steps:
                test[place] = runner.evaluate(stepped.job, data.test)
        for failed in done.failed:
            runner.remove(failed.job)
    return training, validation, test


def _whole(files: Path, folder: Path) -> Table:
    backbone = Backbone.load(files, torch.float32)
    data = {task: data_of(files, task) for task in TABLED}
    rows = tuple(row for space in SPACES for row in drawn(space, backbone.shape, ROWS[space]))
    steps = max(one.steps for one in data.values())
    cells = (len(rows), len(TABLED), len(SEEDS))
    training, validation, test = (np.full((*cells, *more), np.nan) for more in ((steps,), (LOOKS,), ()))
    before = {space: sum(ROWS[other] for other in SPACES[:index]) for index, space in enumerate(SPACES)}
    for share in shares():
        first = before[share.space] + share.first
        cell = slice(first, first + PACK), TABLED.index(share.task), SEEDS.index(share.seed)
        with np.load(folder / share.file, allow_pickle=False) as found:
            training[cell][:, : data[share.task].steps] = found["training"]
            validation[cell], test[cell] = found["validation"], found["test"]
    bare = BoundGraft(parse("lora(r=1)"), backbone.shape)
    nothing = {tensor.name: torch.zeros(tensor.shape) for tensor in bare.tensors}
    untrained = [mean_loss(backbone, bare, nothing, one.validation, _ROWS) for one in data.values()]
    sizes = ", ".join(
        f"{task}: {len(d.train)} examples for training, {len(d.validation)} for validation, {len(d.test)} for the test"
        for task, d in data.items()
    )
    about = (
        f"Llama of {own.LAYERS} layers of {own.HIDDEN}, taught for {own.STEPS} steps of {own.BATCH} x {own.WINDOW} "
        f"tokens (fingerprint {backbone.fingerprint}); batch {BATCH}, {EPOCHS} epoch, AdamW, linear schedule, "
        f"float32; {sizes}; packs of {PACK}; torch {version('torch')}"
    )
    tokens = [EPOCHS * sum(sample.rows for sample in one.train) / one.steps for one in data.values()]
    return Table(
        about=about,
        shape=backbone.shape,
        tasks=TABLED,
        rows=rows,
        training=training.astype(np.float32),
        validation=validation.astype(np.float32),
        test=test.astype(np.float32),
        untrained=np.array(untrained, np.float32),
        tokens=np.array(tokens, np.float32),
    )
