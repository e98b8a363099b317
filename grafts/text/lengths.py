"""How long the examples of a file are, and what of them a limit leaves out: what the owner of a job is told."""

from __future__ import annotations

from dataclasses import dataclass

from polygraft.grafts.text.tokenise import Tokens


@dataclass(frozen=True, slots=True)
class Lengths:
    """Counts over examples: their `tokens` and the `trained` ones among them, and of what was cut off, too."""

    examples: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    cut: int = 0
    cut_tokens: int = 0
    cut_trained: int = 0

    def plus(self, one: Tokens) -> Lengths:
        """With an example more, which is as long as it was before it was cut."""
        whole = len(one.ids) + one.cut
        return Lengths(
            self.examples + 1,
            self.tokens + whole,
            self.trained + sum(weight > 0 for weight in one.weights) + one.unlearned,
            max(self.longest, whole),
            self.cut + (one.cut > 0),
            self.cut_tokens + one.cut,
            self.cut_trained + one.unlearned,
        )

    def warning(self, max_length: int | None) -> str | None:
        """What a limit of `max_length` tokens leaves out, if anything."""
        if not self.cut:
            return None
        return (
            f"{self.cut} of {self.examples} examples are longer than {max_length} tokens (the longest has "
            f"{self.longest}) and are cut: {self.cut_tokens} of {self.tokens} tokens are left out, {self.cut_trained} "
            f"of the {self.trained} trained ones among them"
        )
