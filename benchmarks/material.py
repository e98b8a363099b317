"""What both benchmarks work on: SmolLM2, distinct LoRA grafts on all its projections, and real text cut to size.

As a script it makes these in a folder, from which every arm then reads them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from child import Reply, answer, task

GRAFT = "lora(r=16, alpha=32, at=linear)"
GRAFTS = 8
TRAIN_TOKENS = 64  # all of them predict the next one, so a sample has one id more
SAMPLES = 16  # of each job
PROMPT_TOKENS = 25  # all prompts alike: padding would only slow the rivals down
PROMPTS = 16
_FILE = "material.json"
_B_SIZE = 0.15  # standard deviation of B: with B = 0 a graft would change nothing and the gates see nothing


@dataclass(frozen=True, slots=True)
class Material:
    """Grafts are named by their ids: their folders under `grafts` hold our files and PEFT's. Text is token ids."""

    folder: str
    backbone: str
    grafts: tuple[str, ...]
    samples: tuple[tuple[tuple[int, ...], ...], ...]
    prompts: tuple[tuple[int, ...], ...]

    @staticmethod
    def read(folder: str) -> Material:
        data = json.loads((Path(folder) / _FILE).read_text())
        samples = tuple(tuple(tuple(ids) for ids in job) for job in data["samples"])
        return Material(
            folder, data["backbone"], tuple(data["grafts"]), samples, tuple(tuple(ids) for ids in data["prompts"])
        )

    def graft_folder(self, graft: int) -> Path:
        return Path(self.folder) / "grafts" / self.grafts[graft]


def bytes_read(grafts: int) -> int:
    """Of weights in bf16 by a decoding step, an estimate: SmolLM2's linears and its head, and so many grafts, each
    once."""
    from polygraft.cluster.policy.capacity import ModelSize
    from polygraft.grafts.bound import BoundGraft
    from polygraft.grafts.grammar import parse
    from polygraft.grafts.sites import ModelShape

    shape = ModelShape("llama", layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152)
    linears = ModelSize(shape=shape, itemsize=2).projections
    return 2 * (linears + shape.vocab * shape.hidden + grafts * BoundGraft(parse(GRAFT), shape).parameters)


def make(folder: Path) -> None:
    """Write the grafts and `material.json` into `folder`; always the same."""
    from tokenizers import Tokenizer

    from polygraft.grafts.runtime.pretrained import EMBEDDED, materialise
    from polygraft.launch.cache import backbone_cache
    from polygraft.launch.corpus import load

    backbone = materialise(EMBEDDED, backbone_cache())
    tokenizer = Tokenizer.from_file(str(backbone / "tokenizer.json"))
    streams = []
    for share in load().tenants:
        text = [f"{pair.question}\n{pair.answer}\n" for pair in share.train]
        streams.append([id for encoding in tokenizer.encode_batch(text) for id in encoding.ids])
    samples = tuple(_pieces(stream, TRAIN_TOKENS + 1, SAMPLES) for stream in streams[:GRAFTS])
    prompts = [_pieces(stream, PROMPT_TOKENS, PROMPTS // GRAFTS) for stream in streams]
    material = Material(
        str(folder),
        str(backbone),
        _grafts(folder / "grafts", backbone),
        samples,
        tuple(prompts[i % GRAFTS][i // GRAFTS] for i in range(PROMPTS)),
    )
    (folder / _FILE).write_text(json.dumps(asdict(material)))


def _pieces(ids: Sequence[int], size: int, count: int) -> tuple[tuple[int, ...], ...]:
    """The first `count` pieces of `size` ids."""
    assert len(ids) >= size * count, f"{len(ids)} tokens of text, {size * count} needed"
    return tuple(tuple(ids[i * size : (i + 1) * size]) for i in range(count))


def _grafts(root: Path, backbone_folder: Path) -> tuple[str, ...]:
    import torch

    from polygraft.grafts.bound import BoundGraft
    from polygraft.grafts.formats import native
    from polygraft.grafts.grammar import parse
    from polygraft.grafts.init import initialise
    from polygraft.grafts.runtime.backbone import Backbone

    backbone = Backbone.load(backbone_folder)
    graft = BoundGraft(parse(GRAFT), backbone.shape)
    ids = []
    for number in range(GRAFTS):
        values = initialise(graft, backbone, seed=number, samples=((0,),))
        generator = torch.Generator().manual_seed(number)
        for name, value in values.items():
            if name.endswith(".B"):
                value.normal_(0.0, _B_SIZE, generator=generator)
        ids.append(native.save(root, graft, values, backbone=backbone.fingerprint))
    return tuple(ids)


if __name__ == "__main__":

    def _make() -> Reply:
        make(Path(task().folder))
        return {}

    answer({"make": _make})
