"""What an ingress counts of the requests that it answers, under the names by which vLLM counts them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram

PREFIX = "polygraft:"
Finish = Literal["stop", "length", "abort", "error"]
# vLLM's, in seconds and tokens.
_FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_NEXT_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Meters:
    """Of one ingress, by model. A model is a backbone: neither tenants nor grafts are told apart, which are as many as
    users make."""

    def __init__(self, ingress: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.registry = CollectorRegistry()
        self.ingress = ingress
        self.now = clock
        self.finished = self._counter("request_success", "Requests that ended, by how.", "finished_reason")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens of answers.")
        self.first = self._histogram("time_to_first_token_seconds", "From the request to its first token.", _FIRST_S)
        self.next = self._histogram("inter_token_latency_seconds", "From a token to the next one.", _NEXT_S)
        self.mean = self._histogram(
            "request_time_per_output_token_seconds", "A request's mean time from a token to the next one.", _NEXT_S
        )
        self.whole = self._histogram("e2e_request_latency_seconds", "From the request to its end.", _WHOLE_S)
        self.asked = self._histogram("request_params_max_tokens", "What max_tokens was.", _TOKENS)
        self.prompt = self._histogram("request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self.answer = self._histogram("request_generation_tokens", "Tokens of a request's answer.", _TOKENS)
        self.answers = Counter(
            f"{PREFIX}http_requests",
            "Requests that were answered, by path of the API.",
            ("ingress", "method", "handler", "status"),
            registry=self.registry,
        )

    def begin(self, model: str, asked: float, *, prompt_tokens: int, max_tokens: int) -> Meter:
        """Of a request that was `asked` at a time of `now`."""
        self.asked.labels(model, self.ingress).observe(max_tokens)
        return Meter(self, model, asked, prompt_tokens)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, about, ("model_name", "ingress", *labels), registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, about, ("model_name", "ingress"), registry=self.registry, buckets=buckets)


class Meter:
    """One request's: told of each token, and once of the end."""

    def __init__(self, meters: Meters, model: str, asked: float, prompt_tokens: int) -> None:
        self._meters = meters
        self._labels = (model, meters.ingress)
        self._next = meters.next.labels(*self._labels)
        self._prompt_tokens = prompt_tokens
        self._asked = self._first = self._last = asked
        self._tokens = 0

    def token(self) -> None:
        now = self._meters.now()
        if self._tokens:
            self._next.observe(now - self._last)
        else:
            self._first = now
            self._meters.first.labels(*self._labels).observe(now - self._asked)
            self._meters.prompt_tokens.labels(*self._labels).inc(self._prompt_tokens)
        self._tokens += 1
        self._last = now

    def over(self, reason: Finish) -> None:
        meters, labels, tokens = self._meters, self._labels, self._tokens
        meters.finished.labels(*labels, reason).inc()
        meters.generation_tokens.labels(*labels).inc(tokens)
        meters.whole.labels(*labels).observe(meters.now() - self._asked)
        meters.prompt.labels(*labels).observe(self._prompt_tokens)
        meters.answer.labels(*labels).observe(tokens)
        if tokens > 1:
            meters.mean.labels(*labels).observe((self._last - self._first) / (tokens - 1))
