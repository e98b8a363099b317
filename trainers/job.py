"""A training job as the pack sees it: its graft, its samples, how it learns; and the fixed order and split of its
samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from math import ceil, cos, pi

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.head import Head


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenised example: `weights[t]` is the loss weight of predicting `ids[t]` from what precedes it. One that is
    judged may have choices, of which it is the right one. A text with a `label` ends with a token more, which is not
    read: the label is predicted where the one weight is, from the hidden state of the token before."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    question: Question | None = None
    label: int | None = None

    @staticmethod
    def labelled(ids: Sequence[int], label: int, head: Head) -> Sample:
        """A text of these tokens."""
        read = len(ids) if head.reads_last else 1
        return Sample((*ids, 0), tuple(float(place == read) for place in range(len(ids) + 1)), label=label)

    @property
    def each(self) -> tuple[Sample, ...]:
        """The sample, and its other choices."""
        return (self, *(self.question.others if self.question else ()))

    @property
    def learned(self) -> int:
        """How many tokens have a weight."""
        return sum(weight != 0 for weight in self.weights[1:])

    @property
    def rows(self) -> int:
        """Token rows of the sample in a forward: the last token is only predicted."""
        return len(self.ids) - 1

    @property
    def prompt(self) -> int:
        """How many tokens stand before the first that is learned."""
        return next((t for t in range(1, self.rows) if self.weights[t]), self.rows)

    @property
    def weight(self) -> float:
        return sum(self.weights[1:])


@dataclass(frozen=True, slots=True)
class Question:
    """What an example chooses from: the `texts`, the number of the `answer` among them, and the `others` as samples, in
    their order."""

    texts: tuple[str, ...]
    answer: int
    others: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How a job learns. `batch_size` is the global batch; `micro_rows` fixes its split at admission, for good. It ends
    after the share `until` of its steps."""

    epochs: int
    batch_size: int
    learning_rate: float
    schedule: str = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    seed: int = 0
    micro_rows: int = 128
    until: float = 1.0


@dataclass(frozen=True, slots=True)
class TrainJob:
    """Everything a pack needs to train one job; the same job alone or in company ends with the same weights. It is
    judged on `held_out` before and after, on `test` after."""

    id: str
    graft: BoundGraft
    config: TrainConfig
    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...] = ()
    test: tuple[Sample, ...] = ()
    warnings: tuple[str, ...] = ()  # what its owner should know of its data

    @property
    def files(self) -> Mapping[str, tuple[Sample, ...]]:
        """Its samples by the field that names their file."""
        return {"training_file": self.train, "validation_file": self.held_out, "test_file": self.test}

    def check_tokens(self) -> None:
        """Raise ValueError for an example with a token that the backbone's embedding and head do not have: on a GPU it
        would end the process, and a negative one would be taken for a graft's virtual token."""
        vocabulary = self.graft.shape.vocab
        for name, samples in self.files.items():
            for number, sample in enumerate(samples, 1):
                ids = (token for one in sample.each for token in one.ids)
                outside = next((token for token in ids if not 0 <= token < vocabulary), None)
                if outside is not None:
                    says = f"token {outside} of example {number} is not one of the backbone's {vocabulary}"
                    raise ValueError(f"{name}: {says}")

    @property
    def steps_per_epoch(self) -> int:
        return ceil(len(self.train) / self.config.batch_size)

    @property
    def steps_total(self) -> int:
        return self.steps_per_epoch * self.config.epochs

    @property
    def last_step(self) -> int:
        """After how many of its steps the job ends: its rung, the last of them where it has none."""
        until = self.config.until
        return max(1, round(until * self.steps_total)) if until else 0

    def batch(self, step: int) -> tuple[int, ...]:
        """Sample numbers of global batch `step`: every epoch is its own seeded permutation."""
        epoch, place = divmod(step, self.steps_per_epoch)
        size = self.config.batch_size
        return permutation(len(self.train), seed=self.config.seed, epoch=epoch)[place * size : (place + 1) * size]

    def micro_batches(self, step: int) -> tuple[tuple[int, ...], ...]:
        """Global batch `step` in pieces of at most `micro_rows` rows (one sample at least), in order."""
        batch, virtual = self.batch(step), self.graft.virtual_length
        return tuple(_split(batch, [self.train[i].rows + virtual for i in batch], self.config.micro_rows))

    def key(self, step: int) -> int:
        """32-bit signed hash of (seed, step): what the step's random numbers hang on."""
        return int.from_bytes(sha256(f"{self.config.seed}/{step}".encode()).digest()[:4], "big", signed=True)

    def batch_weight(self, step: int) -> float:
        """The normaliser of global batch `step`: the sum of its loss weights."""
        return sum(self.train[i].weight for i in self.batch(step))

    def learning_rate(self, step: int, phase: range | None = None) -> float:
        """Learning rate of optimiser step `step`: linear warm-up, then its schedule down to 0, over all steps
        or those of its phase."""
        config, total = self.config, self.steps_total
        if phase is not None:
            step, total = phase.index(step), len(phase)
        warmup = int(config.warmup_ratio * total)
        if step < warmup:
            return config.learning_rate * (step + 1) / warmup
        share = (step - warmup) / max(1, total - warmup)
        match config.schedule:
            case "constant":
                return config.learning_rate
            case "linear":
                return config.learning_rate * (1 - share)
            case "cosine":
                return config.learning_rate * 0.5 * (1 + cos(pi * share))
            case other:
                raise ValueError(f"schedule: {other!r} is unknown; choices: constant, linear, cosine")


@lru_cache(maxsize=256)
def permutation(count: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of samples in an epoch: sorted by a hash of (seed, epoch, number); no generator to save or restore."""
    return tuple(sorted(range(count), key=lambda i: sha256(f"{seed}/{epoch}/{i}".encode()).digest()))


def _split(numbers: Sequence[int], rows: Sequence[int], limit: int) -> Iterator[tuple[int, ...]]:
    piece: list[int] = []
    filled = 0
    for number, height in zip(numbers, rows, strict=True):
        if piece and filled + height > limit:
            yield tuple(piece)
            piece, filled = [], 0
        piece.append(number)
        filled += height
    if piece:
        yield tuple(piece)
