"""Tokens of the running step, gathered by ingress until the step is over."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from threading import Lock

from polygraft.serving.messages import Load, StepTokens

_LOG = logging.getLogger(__name__)
Listener = Callable[[tuple[StepTokens, ...], Load], None]


class Outbox:
    """`put` and `flush` belong to the engine's thread; an ingress without a listener gets nothing."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._listeners: dict[str, Listener] = {}
        self._held: dict[str, list[StepTokens]] = defaultdict(list)

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

    def flush(self, load: Load) -> None:
        """One call for every ingress that has something. One that raises hurts no other; its gateway sees the gap."""
        for ingress, tokens in self._held.items():
            with self._lock:
                listener = self._listeners.get(ingress)
            if listener is not None:
                try:
                    listener(tuple(tokens), load)
                except Exception:
                    _LOG.exception("ingress %r did not get its tokens", ingress)
        self._held.clear()
