"""Files: what grafts are saved, exported and merged as, and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parity_models import CAUSAL, model
from parity_names import Backbone, PackRunner, graft_of, named, saved, shaped
from parity_record import Record
from parity_texts import Texts
from parity_train import admitted, grown, stepped_of
from safetensors.torch import load_file


def files(record: Record, root: Path, texts: Texts) -> None:
    """Native folders with PEFT's files, merged models, GGUF files, and LoRAs in place of grafts."""
    for arch in dict.fromkeys(("llama", *texts.architectures(CAUSAL))):
        backbone = Backbone.load(model(root, arch), torch.float32)
        chosen = texts.of("methods" if arch == "llama" else "architectures")
        for seed, (name, text) in enumerate(chosen.items()):
            with record.item(f"files/{arch}/{name}"):
                folder = root / f"files-{arch}" / str(seed)
                _written(record, f"files/{arch}/{name}", folder, backbone, text, grown(text, backbone, seed, texts))


def _written(record: Record, prefix: str, folder: Path, backbone: Any, text: str, values: Any) -> None:
    graft = graft_of(text, backbone)
    native = folder / "native"
    record.folder(f"{prefix}/native", native / saved(native, text, backbone, values))

    def merged() -> None:
        named("grafts.formats.merged:export")(folder / "merged", graft, values, backbone=backbone.folder)
        for name, tensor in load_file(folder / "merged" / "model.safetensors").items():
            record.put(f"{prefix}/merged/{name}", tensor)

    def gguf() -> None:
        path = folder / "graft.gguf"
        export = named("grafts.formats.gguf_lora:export")
        export(path, graft, values, **shaped(export, backbone))
        record.put(f"{prefix}/gguf", path.read_bytes())

    def lora() -> None:
        to_lora = named("grafts.formats.to_lora:to_lora")
        found = to_lora(graft, values=values, weight=backbone.weight, rank=4, **shaped(to_lora, backbone))
        record.put(f"{prefix}/lora", [found.loss, dict(found.tensors)])

    exports: dict[str, Callable[[], None]] = {"merged": merged, "gguf": gguf, "lora": lora}
    for name, export in exports.items():
        with record.item(f"{prefix}/{name}"):
            export()


def checkpoints(record: Record, root: Path, texts: Texts) -> None:
    """The files of a pack's jobs in the middle of their training, and the step that follows when they are read back."""
    checkpoint = named("trainers.checkpoint")
    backbone = Backbone.load(model(root, "llama"), torch.float32, training=True)
    chosen = [*texts.some(12).items(), *texts.of("dropped and united").items(), *texts.of("mezo").items()][:14]
    pack, again = PackRunner(backbone, max_rows=400), PackRunner(backbone, max_rows=400)
    admitted(record, "checkpoint", pack, chosen, texts)
    for _ in range(3):
        stepped_of(record, "checkpoint", pack.step())
    for name, active in pack.jobs.items():
        with record.item(f"checkpoint/{name}"):
            folder = root / "checkpoints" / name
            kept = checkpoint.save(folder, active)
            record.folder(f"checkpoint/{name}/files", folder)
            again.restore(checkpoint.load(folder, kept, active.job, **shaped(checkpoint.load, backbone)))
    again.steps = pack.steps
    stepped_of(record, "checkpoint/read back", again.step())
