"""Where a stop string ends a text that arrives in pieces, a token's worth at a time."""

from __future__ import annotations


class Stops:
    """Holds back the tail of the text that might still become a stop string; what it releases is final."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def push(self, piece: str, *, early: bool = False) -> str:
        """The text that can be shown after `piece`; ends before the first stop string, and sets `hit` there. A stop
        string that ends in an `early` piece is text like any other."""
        if self.hit:
            return ""
        if not self._stops:
            return piece
        held, text = len(self._held), self._held + piece
        if not early:  # the held tail may have a stop string that ended too early
            found = [at for stop in self._stops if (at := text.find(stop, max(0, held - len(stop) + 1))) >= 0]
            if found:
                self.hit, self._held = True, ""
                return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The held tail, once no more text will come."""
        tail, self._held = self._held, ""
        return tail


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-size:])), 0)
