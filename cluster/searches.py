"""The client's view of `/v1/searches`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import ConfigDict, Field, JsonValue

from polygraft.cluster.answers import Answer
from polygraft.cluster.client import Client, segment

_PATH = "/searches"


class RemoteInterval(Answer):
    mean: float
    half_width: float


class RemoteMember(Answer):
    """A trial of the front that was trained again: its mean loss over the seeds, and half the width of its interval;
    its score, and both on the test file."""

    trial: int
    parameters: int
    loss: float
    half_width: float
    seeds: int
    score: RemoteInterval | None = None
    test_loss: RemoteInterval | None = None
    test_score: RemoteInterval | None = None


class RemoteSearch(Answer):
    """A search as its tenant sees it; `trials` counts by state, `front` has the numbers of trials."""

    id: str
    name: str
    created_at: int
    status: str
    note: str | None = None
    objectives: tuple[str, ...] = ()
    trials_total: int = 0
    trials: Mapping[str, int] = Field(default_factory=dict)
    front: tuple[int, ...] = ()
    finals: tuple[RemoteMember, ...] = ()
    chosen: int | None = None
    parameters: tuple[Mapping[str, JsonValue], ...] = ()
    job: Mapping[str, JsonValue] = Field(default_factory=dict)
    shape: Mapping[str, JsonValue] = Field(default_factory=dict)

    @property
    def final(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")


class RemoteCandidate(Answer):
    """A union as text and its learning rate."""

    model_config = ConfigDict(extra="allow", frozen=True)
    peft: str
    learning_rate: float


class RemoteTrial(Answer):
    """A trial as the study's record has it, beside its number and state."""

    model_config = ConfigDict(extra="allow", frozen=True)
    id: str
    number: int
    state: str
    loss: float | None = None
    candidate: RemoteCandidate


def create(client: Client, body: Mapping[str, JsonValue], *, idempotency_key: str | None = None) -> RemoteSearch:
    """Begin a search; with an idempotency key, beginning it again returns the first one."""
    headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
    return client.ask(RemoteSearch, "POST", _PATH, body=body, headers=headers)


def show(client: Client, search: str) -> RemoteSearch:
    return client.ask(RemoteSearch, "GET", f"{_PATH}/{segment(search)}")


def listed(client: Client, limit: int | None = None) -> Iterator[RemoteSearch]:
    """The tenant's searches, newest first."""
    return client.pages(RemoteSearch, _PATH, limit=limit)


def cancel(client: Client, search: str) -> RemoteSearch:
    return client.ask(RemoteSearch, "POST", f"{_PATH}/{segment(search)}/cancel")


def trials(client: Client, search: str) -> Iterator[RemoteTrial]:
    """All trials of a search, in the order they were asked for."""
    return client.pages(RemoteTrial, f"{_PATH}/{segment(search)}/trials")
