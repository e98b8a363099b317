"""How generated token ids become text as they arrive: only characters that no later token can change are shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from polygraft.grafts.text.tokenise import Tokeniser

_BROKEN = "\ufffd"  # what decoders write for bytes that are not, or not yet, a character
_CHARACTER_TOKENS = 4  # a UTF-8 character has at most four bytes, and a token at least one
_CONTEXT_TOKENS = 6


class Detokeniser:
    """Text of a growing list of ids. A function of the ids alone: feeding the same ones again rebuilds the same state.

    Each step decodes a short window that begins at a character boundary, one emission back, so that a decoder which
    drops the space of its first token never drops one that was meant. This is vLLM's and TGI's incremental decoding,
    except that bytes which can never become a character are not held back for ever.
    """

    def __init__(self, tokeniser: Tokeniser, context: Sequence[int] = ()) -> None:
        """`context` is the prompt's ids: the first new token continues its text."""
        self._decode = tokeniser.decode
        self._ids = list(context[-_CONTEXT_TOKENS:])
        self._start = 0  # first id of the window
        self._read = len(self._ids)  # ids before it are shown in full
        self._shown = len(self._decode(self._ids))  # characters of the window's text that are shown

    def feed(self, ids: Iterable[int]) -> str:
        """The text that became certain with `ids`."""
        return "".join(map(self._step, ids))

    def finish(self) -> str:
        """What was held back, broken characters as U+FFFD, once no more ids will come."""
        return self._show(self._decode(self._ids[self._start :]), 0)

    def _step(self, id: int) -> str:
        self._ids.append(id)
        text = self._decode(self._ids[self._start :])
        broken = len(text) - len(text.rstrip(_BROKEN))
        if broken:
            # Until a run is complete, byte-fallback decoders (Llama 2) break all of it, byte-level ones only its end.
            pending = len(self._ids) - self._read
            return self._show(text, broken if pending <= _CHARACTER_TOKENS else 1)
        new = self._show(text, 0)
        if new:
            self._start, self._read = self._read, len(self._ids)
            self._shown = len(self._decode(self._ids[self._start :]))
        return new

    def _show(self, text: str, held: int) -> str:
        new = text[self._shown : len(text) - held]
        self._shown += len(new)
        return new
