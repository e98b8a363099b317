"""Stage 3: one burst of chat requests over all grafts and the bare backbone, through the stock `openai` client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openai import AsyncOpenAI


@dataclass(frozen=True, slots=True)
class Ask:
    """One request; `key` is that of the tenant the model belongs to."""

    model: str
    key: str
    question: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, times in seconds: to the first token, and a token after it (0 for an answer of one token)."""

    model: str
    question: str
    text: str
    tokens: int
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Burst:
    answers: tuple[Answer, ...]
    began_at: float
    wall_s: float

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)

    @property
    def tokens_s(self) -> float:
        return self.tokens / self.wall_s


def burst(url: str, asks: Sequence[Ask], *, max_tokens: int, on_answer: Callable[[Answer], None]) -> Burst:
    """All of `asks` at once, streaming, greedy. Raises what the client raises."""
    began_at, start = time.time(), time.perf_counter()
    answers = asyncio.run(_burst(url, asks, max_tokens, on_answer))
    return Burst(tuple(answers), began_at, time.perf_counter() - start)


def rounds(models: Sequence[tuple[str, str, Sequence[str]]], count: int) -> list[Ask]:
    """`count` requests that go round the models (id, key, questions), each model's questions in order."""
    asks = []
    for index in range(count):
        model, key, questions = models[index % len(models)]
        asks.append(Ask(model, key, questions[index // len(models) % len(questions)]))
    return asks


async def _burst(url: str, asks: Sequence[Ask], max_tokens: int, on_answer: Callable[[Answer], None]) -> list[Answer]:
    clients = {
        key: AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=300)
        for key in {ask.key for ask in asks}
    }
    try:
        return list(await asyncio.gather(*(_ask(clients[ask.key], ask, max_tokens, on_answer) for ask in asks)))
    finally:
        await asyncio.gather(*(client.close() for client in clients.values()))


async def _ask(client: AsyncOpenAI, ask: Ask, max_tokens: int, on_answer: Callable[[Answer], None]) -> Answer:
    start = time.perf_counter()
    first = last = start
    text, tokens = "", 0
    stream = await client.chat.completions.create(
        model=ask.model,
        messages=[{"role": "user", "content": ask.question}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        if piece := "".join(choice.delta.content or "" for choice in chunk.choices):
            last = time.perf_counter()
            first = first if text else last
            text += piece
    answer = Answer(
        ask.model, ask.question, text, tokens, first - start, (last - first) / (tokens - 1) if tokens > 1 else 0.0
    )
    on_answer(answer)
    return answer
