"""What stands in front of the engine costs: CPU seconds of ingress, Serve's proxy and Serve's controller beside the
engine's, while 32 streams are answered over HTTP for a minute. Nothing else may run on the machine.

front_cpu.py [--quick] [--streams N] [--seconds S] [--json PATH]: prints a line a figure; 1 when the claim does not
hold.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import httpx
from figures import conclude
from measure import Claim
from over_http_servers import MODEL, Ours
from program import end_when_told

STREAMS, SECONDS, QUICK_SECONDS, WARM_S = 32, 60.0, 10.0, 10.0
SHARE = 0.1  # of the engine's
FRONT = ("ingress", "proxy", "Serve's controller")
_TOKENS = 200  # of an answer: streams end and begin meanwhile, as they do
_TOKEN = b'"delta":{"content":'  # how the chunk of a token begins
_ASK = "Tell me about the ninth month of the year {number}."


async def streams(server: Ours, count: int, seconds: float) -> int:
    """Keep so many streams going for so long; how many tokens they got. What is underway at the end is broken off."""
    tokens = 0
    until = time.monotonic() + seconds

    async def one(client: httpx.AsyncClient, number: int) -> None:
        nonlocal tokens
        while time.monotonic() < until:
            body = {
                "model": MODEL,
                "messages": [{"role": "user", "content": _ASK.format(number=number)}],
                "max_tokens": _TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                answer.raise_for_status()
                async for piece in answer.aiter_raw():
                    tokens += piece.count(_TOKEN)
                    if time.monotonic() > until:
                        return

    limits = httpx.Limits(max_connections=count)
    headers = {"Authorization": f"Bearer {server.key}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, limits=limits, timeout=120) as client:
        await asyncio.gather(*(one(client, number) for number in range(count)))
    return tokens


def measured(server: Ours, count: int, seconds: float) -> list[Claim]:
    asyncio.run(streams(server, count, min(WARM_S, seconds)))
    begun, before = time.monotonic(), server.cpu()
    tokens = asyncio.run(streams(server, count, seconds))
    took = time.monotonic() - begun
    spent = {name: value - before[name] for name, value in server.cpu().items()}
    front = sum(spent[name] for name in FRONT)
    share = front / spent["engine"]
    return [
        Claim("front_cpu.share", share, "of the engine's CPU seconds", SHARE, "<", share < SHARE),
        Claim("front_cpu.ms_a_token", 1e3 * front / tokens, "ms", None, None, None),
        Claim("front_cpu.tokens_per_s", tokens / took, "1/s", None, None, None),
        *(Claim(f"front_cpu.{name}", value, "CPU s", None, None, None) for name, value in spent.items()),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="front_cpu.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ten seconds: shows that it works, proves nothing")
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    end_when_told()
    seconds = given.seconds or (QUICK_SECONDS if given.quick else SECONDS)
    with (
        tempfile.TemporaryDirectory(prefix="polygraft-bench-") as folder,
        closing(Ours(Path(folder) / "home")) as server,
    ):
        claims = measured(server, given.streams, seconds)
    return conclude("front_cpu", claims, quick=given.quick, json_path=given.json)


if __name__ == "__main__":
    sys.exit(main())
