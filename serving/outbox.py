"""Tokens of the running step, gathered by ingress until the step is over, and the load for who has none."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from threading import Lock

from polygraft.serving.messages import Load, StepTokens

_LOG = logging.getLogger(__name__)
_TELL_S = 0.25  # an ingress without tokens hears of a changed load after this long
Listener = Callable[[tuple[StepTokens, ...], Load], None]


class Outbox:
    """`put` and `flush` belong to the engine's thread; an ingress without a listener gets nothing."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._listeners: dict[str, Listener] = {}
        self._held: dict[str, list[StepTokens]] = defaultdict(list)
        self._told: dict[str, tuple[Load, float]] = {}

    def listen(self, ingress: str, listener: Listener) -> None:
        """From now on `listener` is called, on the engine's thread, with what there is for `ingress`."""
        with self._lock:
            self._listeners[ingress] = listener

    def hears(self, ingress: str) -> bool:
        with self._lock:
            return ingress in self._listeners

    def leave(self, ingress: str, listener: Listener) -> bool:
        """Stop calling `listener`; False when another took its place before."""
        with self._lock:
            if self._listeners.get(ingress) is not listener:
                return False
            del self._listeners[ingress]
            return True

    def put(self, ingress: str, tokens: StepTokens) -> None:
        self._held[ingress].append(tokens)

    def flush(self, load: Load, now: float) -> None:
        """One call for every ingress that has something, or that the load is news to. One that raises hurts no other;
        its gateway sees the gap."""
        with self._lock:
            listeners = dict(self._listeners)
        self._told = {ingress: told for ingress, told in self._told.items() if ingress in listeners}
        for ingress, listener in listeners.items():
            tokens = tuple(self._held.get(ingress, ()))
            before, at = self._told.get(ingress, (None, now - _TELL_S))
            if not tokens and (load == before or now - at < _TELL_S):
                continue
            self._told[ingress] = load, now
            try:
                listener(tokens, load)
            except Exception:
                _LOG.exception("ingress %r did not get its tokens", ingress)
        self._held.clear()
