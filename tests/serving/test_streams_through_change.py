"""What always holds of streams while replicas come, drain, die and lose messages: each stream gets just the tokens that
it would have got from one replica, in order, each once, and nobody computes for it afterwards."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from zlib import crc32

from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.cluster.model import GraftId, ReplicaId
from polygraft.cluster.settings import ServeSettings
from polygraft.serving.gateway import Gateway
from polygraft.serving.messages import Draining, Load, QueueFull, StepMessage, StepTokens
from polygraft.serving.request import GenerationRequest
from tests.serving.engines import request
from tests.serving.replicas import said

SETTINGS = ServeSettings(max_streams=3, max_context=128, max_queued=50)
FAULTS = 2  # replicas that may die under a stream before it is suspected of it
TURNS = 400  # by when every stream is over, once nothing happens any more


class Hurried(asyncio.SelectorEventLoop):
    """Nobody waits: where there is nothing to do before a time, it is that time."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self) -> None:
        super().__init__()
        self._skipped = 0.0

    def time(self) -> float:
        return super().time() + self._skipped

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self._skipped += max(0.0, self._scheduled[0].when() - self.time())
        super()._run_once()  # type: ignore[misc]  # asyncio's own


def spoken(id: str, index: int) -> int:
    """The token that any replica gives the request at that index."""
    return crc32(f"{id}/{index}".encode()) % 1000


@dataclass
class Played:
    """A replica that steps when it is told to. The next `lost` messages after which all their streams go on do not
    arrive: the gap is seen by what comes next."""

    has: dict[str, tuple[GenerationRequest, int]] = field(default_factory=dict)
    draining: bool = False
    dead: bool = False
    lost: int = 0
    out: asyncio.Queue[StepMessage | None] = field(default_factory=asyncio.Queue)
    last: StepMessage | None = None

    async def submit(self, request: GenerationRequest) -> QueueFull | Draining | None:
        if self.dead:
            raise ConnectionError("dead")
        if self.draining:
            return Draining()
        self.has[request.id] = request, len(request.generated)
        return None

    async def cancel(self, request: str) -> None:
        if self.dead:
            raise ConnectionError("dead")
        self.has.pop(request, None)

    async def warm(self, graft: GraftId) -> None: ...

    async def attend(self, ingress: str) -> None:
        if self.dead:
            raise ConnectionError("dead")

    async def messages(self, ingress: str) -> AsyncGenerator[StepMessage, None]:
        if self.dead:
            raise ConnectionError("dead")
        yield StepMessage((), self._load, self.draining)
        while (message := await self.out.get()) is not None:
            yield message
        if self.dead:
            raise ConnectionError("dead")

    def step(self) -> None:
        tokens = []
        for id, (wanted, index) in list(self.has.items())[: SETTINGS.max_streams]:
            over = index + 1 == wanted.max_tokens
            tokens.append(StepTokens(id, index, spoken(id, index), "length" if over else None, wanted.attempt))
            self.has[id] = wanted, index + 1
            if over:
                del self.has[id]
        self._say(StepMessage(tuple(tokens), self._load, self.draining))

    def drain(self) -> None:
        self.draining = True
        self._say(StepMessage((), self._load, True))

    def repeat(self) -> None:
        if self.last is not None:
            self.out.put_nowait(self.last)

    def end(self, *, dead: bool) -> None:
        self.dead = dead
        self.out.put_nowait(None)

    def _say(self, message: StepMessage) -> None:
        self.last = message
        if self.lost and message.tokens and not any(one.finish_reason for one in message.tokens):
            self.lost -= 1
        else:
            self.out.put_nowait(message)

    @property
    def _load(self) -> Load:
        running = min(len(self.has), SETTINGS.max_streams)
        return Load(running=running, waiting=len(self.has) - running, blocks=99, free_blocks=99 - running)


@dataclass(frozen=True)
class Comes:
    """A request for so many tokens."""

    tokens: int


HAPPENS = st.lists(
    st.one_of(
        st.builds(Comes, st.integers(1, 9)),
        st.builds(Comes, st.integers(1, 9)),
        st.sampled_from(["up", "drain", "die", "die unseen", "lose", "repeat", "step", "step", "step"]),
    ),
    max_size=40,
)


async def play(happens: list[Comes | str], picks: list[int]) -> None:
    links: dict[ReplicaId, Played] = {}
    gone: list[Played] = []
    gateway = Gateway({}, ingress="i", settings=SETTINGS)
    await gateway.start()
    work: list[tuple[GenerationRequest, asyncio.Task[list[int]]]] = []
    faults = 0

    def up() -> None:
        links[ReplicaId(f"r{len(links) + len(gone)}")] = Played()
        gateway.follow(links)

    async def turn() -> None:
        """Everybody steps; who has drained is gone."""
        for link in links.values():
            link.step()
        await asyncio.sleep(0.01)
        for id, link in list(links.items()):
            if link.draining and not link.has:
                link.end(dead=False)
                gone.append(links.pop(id))
                gateway.follow(links)

    for at, what in enumerate(happens):
        staying = [id for id, link in links.items() if not link.draining]
        some = staying[picks[at % len(picks)] % len(staying)] if staying else None
        match what:
            case Comes(tokens=tokens):
                wanted = request(f"s{at}", (5, 6), tokens)
                work.append((wanted, asyncio.create_task(said(gateway, wanted))))
            case "up":
                up()
            case "drain" if some is not None:
                links[some].drain()
            case "die" | "die unseen" if some is not None and faults < FAULTS:
                faults += 1
                links[some].end(dead=True)
                gone.append(links.pop(some))
                if what == "die":
                    gateway.follow(links)
                else:  # the store says so later
                    asyncio.get_running_loop().call_later(1.0, lambda: gateway.follow(links))
            case "lose" if some is not None and faults < FAULTS:
                faults += 1
                links[some].lost += 1
            case "repeat" if some is not None:
                links[some].repeat()
            case "step":
                await turn()
        await asyncio.sleep(0.001)
    up()
    for _ in range(TURNS):
        if all(task.done() for _, task in work):
            break
        await turn()
    assert [await task for _, task in work] == [
        [spoken(wanted.id, index) for index in range(wanted.max_tokens)] for wanted, _ in work
    ]
    for _ in range(3):
        await turn()
    assert not gateway.demand.total and not any(link.has for link in links.values()), "nobody computes for nobody"
    await gateway.close()


@settings(max_examples=80)
@given(HAPPENS, st.lists(st.integers(0, 7), min_size=1, max_size=6))
def test_no_token_is_lost_or_said_twice_and_no_stream_waits_for_ever(
    happens: list[Comes | str], picks: list[int]
) -> None:
    with asyncio.Runner(loop_factory=Hurried) as runner:
        runner.run(play(happens, picks))
