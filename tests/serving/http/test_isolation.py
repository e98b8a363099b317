"""A request that fails where text is made of tokens, or in the engine: a 500 of its own, with an id that
the log has, and its neighbours' answers as if it had not been there."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import httpx
import pytest

from polygraft.serving.engine import Engine
from polygraft.serving.http.stops import Stops
from polygraft.serving.http.transcript import Transcript
from tests.serving.http.conftest import Service, refusal

pytestmark = pytest.mark.anyio
NEIGHBOURS = ("What is a graft?", "How do you make one?", "When do you do it?")


def body(text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "max_tokens": 10, "temperature": 0, **fields}


async def answers(client: httpx.AsyncClient, *bodies: dict[str, Any]) -> list[httpx.Response]:
    return await asyncio.gather(*(client.post("/chat/completions", json=one) for one in bodies))


def texts(found: list[httpx.Response]) -> list[str]:
    return [answer.json()["choices"][0]["message"]["content"] for answer in found]


def plant(place: str, patch: pytest.MonkeyPatch) -> None:
    match place:
        case "detokenising":
            text = Transcript._text

            def made(self: Transcript, tokens: Any) -> str:
                if self._stops._stops == ("culprit",):
                    raise ValueError("a broken tokenizer")
                return text(self, tokens)

            patch.setattr(Transcript, "_text", made)
        case "stop strings":
            push = Stops.push

            def pushed(self: Stops, piece: str, *, early: bool) -> str:
                if self._stops == ("culprit",):
                    raise ValueError("a broken stop string")
                return push(self, piece, early=early)

            patch.setattr(Stops, "push", pushed)
        case "the engine":
            forward = Engine._forward

            def computed(engine: Engine, batch: Any) -> Any:
                if any(chunk.sequence.request.seed == 77 for chunk in batch.chunks):
                    raise ValueError("a broken forward")
                return forward(engine, batch)

            patch.setattr(Engine, "_forward", computed)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", ["detokenising", "stop strings", "the engine"])
async def test_a_request_that_fails_gets_a_500_of_its_own_and_its_neighbours_their_answers(  # noqa: PLR0913
    service: Service,
    ann: httpx.AsyncClient,
    bob: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[logging.LogRecord],
    place: str,
    stream: bool,
) -> None:
    alone = texts(await answers(bob, *(body(text) for text in NEIGHBOURS)))
    plant(place, monkeypatch)
    bad = ann.post("/chat/completions", json=body("Why does it work?", stop="culprit", seed=77, stream=stream))
    failed, beside = await asyncio.gather(bad, answers(bob, *(body(text) for text in NEIGHBOURS)))
    assert texts(beside) == alone
    if stream and failed.status_code == 200:  # it had begun: the error is its last event
        assert '"error"' in failed.text and "[DONE]" not in failed.text
        told = failed.text
    else:
        told = refusal(failed, 500)["message"]
    assert "broken" not in told
    (reference,) = re.findall(r"err-[0-9a-f]+", told)
    assert any(reference in line.getMessage() for line in logged)
    assert service.engine.load.running == 0 and texts(await answers(bob, body(NEIGHBOURS[0]))) == alone[:1]
