"""How well examples with known answers are answered, beside their loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Shares in [0, 1], the higher the better; None where the examples do not ask for one.

    `exact_match`: answers that greedy decoding reproduces to the last token. `token_f1`: the mean overlap of the
    likeliest tokens with the answer's, as bags. `accuracy`: right choices, the likeliest being taken; `accuracy_norm`:
    when a choice's log-likelihood is divided by its length in bytes. `macro_f1`: the mean F1 of the choices, where all
    examples have the same. How each is computed: `trainers/scores.py`.
    """

    exact_match: float | None = None
    token_f1: float | None = None
    accuracy: float | None = None
    accuracy_norm: float | None = None
    macro_f1: float | None = None

    @staticmethod
    def of(told: Mapping[str, float]) -> Scores:
        """Inverse of `told`; names that there are not are left out."""
        return Scores(**{name: value for name, value in told.items() if name in SCORES[1:]})

    @property
    def score(self) -> float | None:
        """The one that says most of the examples: accuracy where they have choices, else exact match."""
        return self.exact_match if self.accuracy is None else self.accuracy

    @property
    def told(self) -> Mapping[str, float]:
        """Those that there are, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def get(self, name: str) -> float | None:
        """The one of this name, or `score`."""
        return self.score if name == "score" else self.told.get(name)


UNSCORED = Scores()
_LABELLED = frozenset({"score", "accuracy", "macro_f1"})  # what labelled texts tell
SCORES = ("score", *(field.name for field in fields(Scores)))


def scores_told(*, choices: bool, labels: bool) -> frozenset[str]:
    """The names of the scores that examples of a kind can tell."""
    answers = frozenset({"score", "exact_match", "token_f1"})
    return _LABELLED if labels else frozenset(SCORES) if choices else answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a job's examples said beside the losses in its record: the validation file `before` and `after` training,
    the test file after it."""

    before: Scores = UNSCORED
    after: Scores = UNSCORED
    test_loss: float | None = None
    test: Scores = UNSCORED


UNJUDGED = Judged()
