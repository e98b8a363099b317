"""The text of one answer, rebuilt from its tokens as they arrive, up to a stop string."""

from __future__ import annotations

from polygraft.grafts.text.detokenise import Detokeniser
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.serving.http.generations import FinishReason, Usage
from polygraft.serving.http.stops import Stops
from polygraft.serving.messages import StepTokens


class Transcript:
    """Feed it the tokens of a request that does not fail, in order, until `finish_reason` is set. Stop strings count
    once it has `min_tokens`."""

    def __init__(
        self, tokeniser: Tokeniser, prompt_ids: tuple[int, ...], stops: tuple[str, ...], min_tokens: int = 0
    ) -> None:
        self._detokeniser = Detokeniser(tokeniser, prompt_ids)
        self._stops = Stops(stops)
        self._prompt_tokens = len(prompt_ids)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._cached = 0
        self.finish_reason: FinishReason | None = None

    def feed(self, tokens: StepTokens) -> str:
        """The text that became certain."""
        self._tokens += tokens.token is not None
        if tokens.index == 0:  # later ones, of another replica, had more to find
            self._cached = tokens.found
        match tokens.finish_reason:
            case "stop":  # the end token itself is no text, whether or not the tokenizer calls it special
                return self._end("stop", "")
            case "length":
                return self._end("length", self._text(tokens))
        piece = self._push(self._text(tokens))
        if self._stops.hit:
            self.finish_reason = "stop"
        return piece

    @property
    def counts(self) -> tuple[int, int, int]:
        """Tokens of prompt and answer, the end token among them, and those of the prompt that were computed before; a
        graft's prefix rows are nobody's tokens."""
        return self._prompt_tokens, self._tokens, self._cached

    @property
    def usage(self) -> Usage:
        return Usage.of(*self.counts)

    def _text(self, tokens: StepTokens) -> str:
        return "" if tokens.token is None else self._detokeniser.feed((tokens.token,))

    def _push(self, piece: str) -> str:
        return self._stops.push(piece, early=self._tokens <= self._min_tokens)

    def _end(self, reason: FinishReason, piece: str) -> str:
        last = self._push(piece + self._detokeniser.finish())
        self.finish_reason = "stop" if self._stops.hit else reason
        return last + self._stops.flush()
