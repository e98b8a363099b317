"""Serving: tokens, and the logits of every step, of streams of all grafts and the bare backbone in one batch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from parity_models import CAUSAL, VOCAB, model
from parity_names import Backbone, Engine, GenerationRequest, ServeSettings, named, saved
from parity_record import Record
from parity_texts import Texts
from parity_train import grown
from torch import Tensor

_TOKENS = 6
_TURNS = 3000


def serve(record: Record, root: Path, texts: Texts) -> None:
    """All grafts in one batch of decoding rows, greedy and drawn; then some of them in chunks beside one another, and
    other decoders."""
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        backbone = Backbone.load(model(root, "llama"), dtype)
        wide = Served(record, f"serve/{name}", backbone, root / f"grafts-{name}", texts.of("methods"), texts)
        wide.all_together(max_rows=4096)
        narrow = Served(record, f"serve/chunked/{name}", backbone, root / f"grafts-{name}", texts.some(6), texts)
        narrow.all_together(max_rows=40)
    with patch.object(named("kernels.dense.op"), "library", lambda: None):
        backbone = Backbone.load(model(root, "llama"), torch.bfloat16)
        Served(record, "serve/fallback", backbone, root / "grafts-bf16", texts.some(6), texts).all_together(4096)
    nf4 = Backbone.load(model(root, "llama"), torch.float32, quantise="nf4")
    Served(record, "serve/nf4", nf4, root / "grafts-nf4", texts.of("nf4"), texts).all_together(4096)
    for arch in texts.architectures(CAUSAL):
        backbone = Backbone.load(model(root, arch), torch.float32)
        chosen = {name: text for name, text in texts.of("architectures").items() if "mezo" not in text}
        Served(record, f"serve/{arch}", backbone, root / f"grafts-{arch}", chosen, texts).all_together(64)


class Served:
    """An engine whose grafts are in memory before the first of the streams that are recorded."""

    def __init__(
        self, record: Record, prefix: str, backbone: Any, data: Path, chosen: Mapping[str, str], texts: Texts
    ) -> None:
        self._record, self._prefix, self._backbone, self._data = record, prefix, backbone, data
        self._grafts: dict[str, str | None] = {"bare": None}
        for seed, (name, text) in enumerate(chosen.items()):
            with record.item(f"{prefix}/{name}"):
                values = grown(text, backbone, seed, texts)
                self._grafts[name] = saved(data / "grafts", text, backbone, values)
        self._ends: dict[str, Any] = {}
        self._tokens: dict[str, list[int]] = {}

    def all_together(self, max_rows: int) -> None:
        settings = ServeSettings(max_streams=400, max_queued=400, max_context=96, kv_bytes=64 << 20, max_rows=max_rows)
        engine = Engine(self._backbone, settings, replica="r0", data=self._data)
        engine.listen("", self._hear)
        for name, graft in self._grafts.items():  # one after the other, so that what is in memory has one order
            engine.submit(self._request(f"warm {name}", graft, (5, 6, 7), 1))
            self._run(engine)
        rows: dict[str, list[Tensor]] = {}
        module = named("serving.engine")
        sample = module.sample
        streams: dict[int, str] = {}

        def recorded(logits: Tensor, draws: Sequence[Any]) -> Any:
            for row, draw in zip(logits, draws, strict=True):
                rows.setdefault(streams[draw.seed], []).append(row.clone())
            return sample(logits, draws)

        with patch.object(module, "sample", recorded):
            for seed, (name, graft) in enumerate(self._grafts.items()):
                streams[seed] = name
                drawn = {"temperature": 0.8, "top_p": (1.0, 0.7)[seed % 4 == 1]} if seed % 2 else {}
                engine.submit(self._request(name, graft, _prompt(seed), _TOKENS, seed=seed, **drawn))
            self._run(engine)
        engine.stop()
        for name in self._grafts:
            end = self._ends.get(name)
            self._record.put(f"{self._prefix}/{name}/tokens", self._tokens.get(name, []))
            self._record.put(f"{self._prefix}/{name}/end", str(end and end.finish_reason))
            for step, row in enumerate(rows.get(name, ())):
                self._record.put(f"{self._prefix}/{name}/logits {step}", row)

    def _request(self, id: str, graft: str | None, prompt: tuple[int, ...], count: int, **fields: Any) -> Any:
        said = {"temperature": 0.0, "tenant": "t", **fields}
        return GenerationRequest(id=id, graft=graft, prompt_ids=prompt, max_tokens=count, **said)

    def _hear(self, step: Sequence[Any], _: object) -> None:
        for said in step:
            if said.token is not None:
                self._tokens.setdefault(said.request, []).append(said.token)
            if said.finish_reason is not None:
                self._ends[said.request] = said

    def _run(self, engine: Any) -> None:
        for _ in range(_TURNS):
            busy = engine.turn()
            if not busy and not engine.load.waiting and not engine.load.running:
                return
            if not busy:
                time.sleep(0.002)  # a graft is read in another thread
        raise RuntimeError(f"still busy after {_TURNS} turns: {engine.load}")


def _prompt(seed: int) -> tuple[int, ...]:
    made = torch.Generator().manual_seed(500 + seed)
    return tuple(torch.randint(3, VOCAB, (3 + 5 * seed % 17,), generator=made).tolist())
