"""Two backbones of more than 100 M parameters and of two families in one service, beside each alone in one of its own:
the memory of the processes that hold them, what they say, and what a job on each gives. Then one is unloaded and loaded
again while the other answers four clients.

two_backbones.py [--json PATH]: prints a line a figure; 1 when a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from figures import conclude
from harness import ArmFailed
from measure import Claim
from over_http_servers import MODEL, Ours
from program import end_when_told
from pydantic import JsonValue

from polygraft.cluster.client import Client
from polygraft.grafts.runtime.pretrained import materialise
from polygraft.launch.cache import backbone_cache
from polygraft.launch.corpus import load

OTHER, SHARE = "gpt2", 1.1  # of what each takes alone, in sum
TOKENS, CLIENTS, UNLOAD_S, UNTIL_S = 32, 4, 60, 300.0
ASKS = ("What is a graft?", "Tell me about the ninth month.", "Why is the sky blue?", "Count to ten.")
_HOLDERS = (":Host", ":ServeReplica:backbone-")  # the process of an engine, and the one that watches it


def random_gpt2(like: Path, folder: Path) -> Path:
    """124 M random parameters, with the tokenizer of the backbone in `like`."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    told = json.loads((like / "config.json").read_text())
    ends = {name: told.get(name) for name in ("bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=told["vocab_size"], initializer_range=0.1, **ends)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(like / name, folder / name)
    return folder


@dataclass(frozen=True, slots=True)
class Found:
    """Of one backbone in one service: what it says to each of ASKS, and the id of a job's graft, a digest of it."""

    texts: tuple[str, ...]
    graft: str


def says(client: Client, model: str, ask: str) -> str:
    return "".join(client.chat(model, [{"role": "user", "content": ask}], max_tokens=TOKENS, temperature=0))


def found(client: Client, model: str, texts: Sequence[str]) -> Found:
    """With the graft of a job of four steps. Raises ArmFailed."""
    lines = b"".join(load().tenants[0].train_jsonl.splitlines(keepends=True)[:16])
    file = client.upload(lines, filename="few.jsonl").id
    method: JsonValue = {
        "type": "supervised",
        "supervised": {"hyperparameters": {"peft": "lora(r=8)", "batch_size": 4}},
    }
    job = client.wait(client.create_job({"model": model, "training_file": file, "seed": 1, "method": method}).id)
    if job.graft is None:
        raise ArmFailed(f"the job on {model} is {job.status}: {job.error}")
    return Found(tuple(texts), job.graft)


def measured(home: Path, backbones: Mapping[str, Path], default: str) -> tuple[int, dict[str, Found], dict[str, float]]:
    """A service with these backbones: bytes of what holds them, what was found of each, and more figures where they
    are two."""
    settings = {"POLYGRAFT_UNLOAD_S": f"{UNLOAD_S}", "POLYGRAFT_BACKBONE": default}
    with ExitStack() as stack:
        server = stack.enter_context(closing(Ours(home, options=["--devices", "2"], settings=settings)))
        client = stack.enter_context(Client(server.url, server.key, timeout_s=UNTIL_S))
        for name in backbones.keys() - {default}:
            client.add_backbone(name, str(backbones[name]), dtype="auto", quantise=None)
        texts = {name: [says(client, name, ask) for ask in ASKS] for name in backbones}
        held = server.pss(_HOLDERS)
        if gone := [one.id for one in client.backbones() if one.state != "loaded"]:
            raise ArmFailed(f"{', '.join(gone)}: not loaded any more when memory was measured")
        seen = {name: found(client, name, texts[name]) for name in backbones}
        return held, seen, reloaded(client, default, seen) if len(backbones) > 1 else {}


def reloaded(client: Client, default: str, seen: Mapping[str, Found]) -> dict[str, float]:
    """The one that nobody asks is unloaded, and loaded again by the next who asks, while the default one answers."""
    over, wrong, answers = Event(), [0], [0]

    def ask_on(number: int) -> None:
        while not over.is_set():
            at = (number + answers[0]) % len(ASKS)
            wrong[0] += says(client, default, ASKS[at]) != seen[default].texts[at]
            answers[0] += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask_on, number) for number in range(CLIENTS)]
        try:
            begun = time.monotonic()
            while {one.id: one.state for one in client.backbones()}[OTHER] != "unloaded":
                if time.monotonic() - begun > UNTIL_S:
                    raise ArmFailed(f"{OTHER} was not unloaded within {UNTIL_S:g} s")
                time.sleep(0.5)
            begun = time.monotonic()
            again = says(client, OTHER, ASKS[0])
            took = time.monotonic() - begun
        finally:
            over.set()
        for one in asking:
            one.result()
    return {"wrong": wrong[0] + (again != seen[OTHER].texts[0]), "answers": answers[0], "reload_s": took}


def main() -> int:
    parser = argparse.ArgumentParser(prog="two_backbones.py", description=__doc__)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    end_when_told()
    with tempfile.TemporaryDirectory(prefix="polygraft-bench-") as name:
        folder = Path(name)
        own = materialise(MODEL, backbone_cache())
        other = random_gpt2(own, folder / OTHER)
        held, seen, more = measured(folder / "both", {MODEL: own, OTHER: other}, MODEL)
        own_held, own_seen, _ = measured(folder / "own", {MODEL: own}, MODEL)
        other_held, other_seen, _ = measured(folder / "other", {str(other): other}, str(other))
    pairs = ((seen[MODEL], own_seen[MODEL]), (seen[OTHER], other_seen[str(other)]))
    share = held / (own_held + other_held)
    texts = sum(one != two for here, alone in pairs for one, two in zip(here.texts, alone.texts, strict=True))
    grafts = sum(here.graft != alone.graft for here, alone in pairs)
    wrong = {"texts": texts, "grafts": grafts, "texts_under_load": more["wrong"]}
    sizes = {"both": held, MODEL: own_held, OTHER: other_held}
    claims = [
        Claim("two_backbones.memory", share, "of each alone, in sum", SHARE, "<", share < SHARE),
        *(Claim(f"two_backbones.{what}", n, "other than alone", 1, "<", n < 1) for what, n in wrong.items()),
        Claim("two_backbones.meanwhile", more["answers"], "answers", None, None, None),
        Claim("two_backbones.loaded_again", more["reload_s"], "s to the whole answer", None, None, None),
        *(Claim(f"two_backbones.held_{what}", n / 2**20, "MiB", None, None, None) for what, n in sizes.items()),
    ]
    return conclude("two_backbones", claims, quick=False, json_path=given.json)


if __name__ == "__main__":
    sys.exit(main())
