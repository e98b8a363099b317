"""How well a graft answers examples whose answers are known, from forward passes alone: nothing is generated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from polygraft.cluster.scores import Scores


@dataclass(frozen=True, slots=True)
class Answer:
    """One example under teacher forcing: the summed `loss` of its weighted tokens, which they are (`meant`), and the
    graft's likeliest token in the place of each (`said`). Of a text with a label these are its number and the likeliest
    one's."""

    loss: float
    meant: tuple[int, ...]
    said: tuple[int, ...]

    @property
    def matches(self) -> bool:
        return self.said == self.meant

    @property
    def overlap(self) -> float:
        """The share of the tokens that are among the likeliest ones wherever they stand."""
        return (Counter(self.said) & Counter(self.meant)).total() / len(self.meant)


@dataclass(frozen=True, slots=True)
class Chosen:
    """An example with choices: the summed losses of all, and the one that is right."""

    texts: tuple[str, ...]
    answer: int
    losses: tuple[float, ...]

    @property
    def likeliest(self) -> int:
        """The choice with the highest likelihood of its tokens, the one that ends its turn among them; of several equal
        ones the first."""
        return min(range(len(self.losses)), key=lambda i: self.losses[i])

    @property
    def likeliest_by_length(self) -> int:
        """The same with each log-likelihood divided by the choice's length in bytes of UTF-8, which hangs on no
        tokeniser (`acc_norm` of EleutherAI's lm-evaluation-harness)."""
        return min(range(len(self.losses)), key=lambda i: self.losses[i] / len(self.texts[i].encode()))


def scores_of(answers: Sequence[Answer], chosen: Sequence[Chosen]) -> Scores:
    """Means over the examples; `chosen` are those that have choices.

    An answer counts as an exact match if the likeliest token at each of its places is the answer's, the places before
    it holding the answer's own tokens. That is so if and only if greedy decoding reproduces it: by induction over its
    places, decoding that has said the answer so far sees what teacher forcing sees, and goes on with the likeliest
    token; at the first place where that is another one, decoding leaves the answer for good. The token that ends the
    turn is one of the places, so decoding stops there, too. Of an example with several answers each follows the
    others' true texts, and all have to match.

    Both bags of `token_f1` have as many tokens as the answer, so precision, recall and F1 are one number. It is of
    teacher forcing: after the first wrong token a decoded answer would go another way.
    """
    if not answers:
        return Scores()
    alike = bool(chosen) and len({frozenset(one.texts) for one in chosen}) == 1
    return Scores(
        exact_match=fmean(one.matches for one in answers),
        token_f1=fmean(one.overlap for one in answers),
        accuracy=fmean(one.likeliest == one.answer for one in chosen) if chosen else None,
        accuracy_norm=fmean(one.likeliest_by_length == one.answer for one in chosen) if chosen else None,
        macro_f1=macro_f1((one.texts[one.answer], one.texts[one.likeliest]) for one in chosen) if alike else None,
    )


def label_scores(answers: Sequence[Answer]) -> Scores:
    """Of texts with labels: how many get the right one, and the mean F1 of the labels."""
    pairs = [(str(one.meant[0]), str(one.said[0])) for one in answers]
    return Scores(accuracy=fmean(one.matches for one in answers), macro_f1=macro_f1(pairs))


def macro_f1(pairs: Iterable[tuple[str, str]]) -> float:
    """The mean over the classes that occur of 2 tp / (2 tp + fp + fn), by pairs of the true class and the one that was
    taken; a class counts as much as any other."""
    both = list(pairs)
    found = []
    for name in sorted({name for pair in both for name in pair}):
        hits = sum(true == name == taken for true, taken in both)
        found.append(2 * hits / sum((true == name) + (taken == name) for true, taken in both))
    return fmean(found)
