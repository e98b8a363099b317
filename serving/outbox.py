"""Tokens of the running step, gathered by ingress until the step is over."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from threading import Lock

from polygraft.serving.messages import Load, StepTokens

_LOG = logging.getLogger(__name__)
_NEWS_S = 1.0  # how old a load may get that an ingress without tokens was told
Listener = Callable[[tuple[StepTokens, ...], Load], None]


class Outbox:
    """`put` and `flush` belong to the engine's thread; an ingress without a listener gets nothing."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._listeners: dict[str, Listener] = {}
        self._held: dict[str, list[StepTokens]] = defaultdict(list)
        self._told: dict[str, tuple[Load, float]] = {}  # what each heard last of the load, and when

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
        """One call for every ingress that has something, or has not heard of the load for a second. One that raises
        hurts no other; its gateway sees the gap."""
        with self._lock:
            listeners = dict(self._listeners)
        for ingress, listener in listeners.items():
            tokens = tuple(self._held.get(ingress, ()))
            told = self._told.get(ingress)
            if not tokens and told is not None and (told[0] == load or now - told[1] < _NEWS_S):
                continue
            self._told[ingress] = load, now
            try:
                listener(tokens, load)
            except Exception:
                _LOG.exception("ingress %r did not get its tokens", ingress)
        for ingress in self._told.keys() - listeners.keys():
            del self._told[ingress]
        self._held.clear()
