"""Logits of grafts side by side on the backbones that take no jobs: encoders, encoder and decoder, images."""

from __future__ import annotations

from pathlib import Path

import torch
from parity_models import OTHERS, model
from parity_names import Backbone, named, resident_of
from parity_record import Record
from parity_texts import Texts
from parity_train import grown

_IDS = [torch.tensor([5, 17, 300, 42, 8, 511, 3, 99]), torch.arange(2, 30), torch.tensor([7])]


def forward(record: Record, root: Path, texts: Texts) -> None:
    """All grafts that fit, and the bare backbone, in one batch."""
    packed = named("tests.grafts.packing:packed")
    for arch in OTHERS:
        for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
            backbone = Backbone.load(model(root, arch), dtype)
            names, residents = ["bare"], []
            for seed, (graft, text) in enumerate(texts.of("encoders").items()):
                with record.item(f"forward/{arch}/{name}/{graft}"):
                    residents.append(resident_of(graft, text, backbone, grown(text, backbone, seed, texts)))
                    names.append(graft)
            grafts = [(None, None), *((place, resident.spec) for place, resident in enumerate(residents))]
            rows, attention, answers = packed(backbone, grafts, [_IDS] * len(grafts))
            with torch.inference_mode():
                hidden = backbone.forward(rows, backbone.stacks(residents), attention)
                logits = [backbone.logits(hidden[places]) for places in answers]
            for number, found in enumerate(logits):
                place, sequence = divmod(number, len(_IDS))
                record.put(f"forward/{arch}/{name}/{names[place]}/{sequence}", found)
