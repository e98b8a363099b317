"""What every arm of the search benchmark does: sixteen LoRA trials on the same samples in the same order, judged on the
same held-out ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

if TYPE_CHECKING:
    from polygraft.grafts.sites import ModelShape

TRIALS, ROWS, HELD_OUT, WORDS = 16, 64, 16, 48
ETA = 3
RATES = (1e-4, 1e-3)
SITES: Mapping[str, tuple[str, ...]] = {
    "attn.[qv]": ("q_proj", "v_proj"),
    "attn.*": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
RANKS = (4, 8, 16, 32)
ALPHA = 16
SEED = 0
WARM = 9  # samples of the job that opens the pack, by which the gate sees that both sides train alike
START = "start"  # the folder of the adapter that it begins with, as PEFT made it
_FILE = "work.json"


@dataclass(frozen=True, slots=True)
class LoraTrial:
    number: int
    rank: int
    modules: tuple[str, ...]
    learning_rate: float
    parameters: int


WARM_TRIAL = LoraTrial(0, RANKS[0], SITES["attn.[qv]"], RATES[1], 0)


@dataclass(frozen=True, slots=True)
class Work:
    """`order` has the numbers of the samples of every step, `warm` those of the job that opens the pack; a sample is
    ids and the weights with which each is predicted. With `halving` trials are judged at the rungs."""

    folder: str
    backbone: str
    halving: bool
    order: tuple[tuple[int, ...], ...]
    train: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]
    held_out: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]
    trials: tuple[LoraTrial, ...]
    warm: tuple[tuple[int, ...], ...] = ()

    @property
    def steps(self) -> int:
        return len(self.order)

    def stops(self, steps: int) -> tuple[int, ...]:
        """Where a trial of so many steps is judged, after a ninth and a third of them, and its end."""
        return (-(-steps // ETA**2), -(-steps // ETA), steps) if self.halving else (steps,)

    @property
    def tokens(self) -> int:
        """Of all trials, if each is trained to its end."""
        return len(self.trials) * ROWS * sum(map(len, self.order))

    @staticmethod
    def read(folder: str) -> Work:
        data = json.loads((Path(folder) / _FILE).read_text())
        samples = {
            part: tuple((tuple(ids), tuple(weights)) for ids, weights in data[part]) for part in ("train", "held_out")
        }
        trials = tuple(LoraTrial(**{**trial, "modules": tuple(trial["modules"])}) for trial in data["trials"])
        order, warm = (tuple(map(tuple, data[part])) for part in ("order", "warm"))
        return Work(folder, data["backbone"], data["halving"], order, trials=trials, warm=warm, **samples)


def steps_of(tokens: int, batch: int) -> int:
    """Of a trial of about so many tokens: a multiple of 9, so that both sides' rungs are the same."""
    return ETA**2 * max(1, round(tokens / (ROWS * batch * ETA**2)))


def request(batch: int, *, halving: bool, training_file: str, validation_file: str) -> dict[str, JsonValue]:
    """The search as our service is asked for it. The sampler does not look at results: the trials are known before."""
    search: dict[str, JsonValue] = {"r": list(RANKS), "at": list(SITES)}
    return {
        "name": "bench",
        "training_file": training_file,
        "validation_file": validation_file,
        "trials": TRIALS,
        "concurrency": TRIALS,
        "sampler": "lhs",
        "pruner": "halving" if halving else "none",
        "objectives": ["loss"] if halving else ["loss", "parameters"],
        "seed": SEED,
        "space": {
            "kind": "union",
            "learning_rate": list(RATES),
            "terms": [{"method": "lora", "search": search, "fixed": {"alpha": ALPHA}}],
        },
        "hyperparameters": {
            "n_epochs": 1,
            "batch_size": batch,
            "max_length": ROWS + 1,
            "schedule": "linear",
            "max_grad_norm": 1.0,
        },
    }


def trials_of(body: Mapping[str, JsonValue], shape: ModelShape) -> Iterator[LoraTrial]:
    """What the service will ask for, from the same plan."""
    from polygraft.tuning.request import SearchRequest
    from polygraft.tuning.study import Study

    plan = SearchRequest.model_validate(body).plan(backbone="any", shape=shape)
    study = Study(plan.space, plan.objectives, plan.sampler)
    for number in range(TRIALS):
        trial = study.ask()
        modules = tuple(SITES.values())[int(trial.config["lora.at"])]
        rank = RANKS[int(trial.config["lora.r"])]
        yield LoraTrial(number, rank, modules, trial.candidate.learning_rate, trial.candidate.parameters)


def make(folder: Path, backbone: Path, *, steps: int, batch: int, halving: bool) -> Work:
    """Write the files into the folder; always the same."""
    from polygraft.grafts.sites import ModelShape
    from polygraft.grafts.text.jsonl import read
    from polygraft.grafts.text.tokenise import Tokeniser
    from polygraft.launch.corpus import Pair, jsonl
    from polygraft.trainers.job import permutation

    texts = list(_texts(steps * batch + HELD_OUT))
    tokeniser = Tokeniser.load(backbone)
    samples: dict[str, tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]] = {}
    for part, some in (("train", texts[HELD_OUT:]), ("held_out", texts[:HELD_OUT])):
        path = folder / f"{part}.jsonl"
        path.write_bytes(jsonl(Pair("Go on.", text) for text in some))
        found = [tokeniser.encode_example(example, ROWS + 1) for example in read(path)]
        assert all(len(one.ids) == ROWS + 1 for one in found), "a sample is shorter than it is to be"
        samples[part] = tuple((one.ids, one.weights) for one in found)
    order, warm = (permutation(count, seed=SEED, epoch=0) for count in (steps * batch, WARM))
    shape = ModelShape.from_config(json.loads((backbone / "config.json").read_text()))
    work = Work(
        folder=str(folder),
        backbone=str(backbone),
        halving=halving,
        order=tuple(order[step * batch : (step + 1) * batch] for step in range(steps)),
        trials=tuple(trials_of(request(batch, halving=halving, training_file="a", validation_file="b"), shape)),
        warm=tuple(warm[first : first + batch] for first in range(0, WARM, batch)),
        **samples,
    )
    (folder / _FILE).write_text(json.dumps(asdict(work)))
    return work


def _texts(count: int) -> Iterator[str]:
    """Pieces of so many words of the corpus, one after the other; from its beginning again when it is over."""
    from polygraft.launch.corpus import load

    corpus = load(most=1000, characters=400)
    pairs = [pair for share in (*corpus.tenants, corpus.search) for pair in (*share.train, *share.held_out)]
    words: Sequence[str] = " ".join(f"{pair.question} {pair.answer}" for pair in pairs).split()
    for number in range(count):
        start = number * WORDS % (len(words) - WORDS)
        yield " ".join(words[start : start + WORDS])
