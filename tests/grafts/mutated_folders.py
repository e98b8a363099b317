"""Adapter folders changed at random by a seed: configs, headers and tensors that are nearly right, files that are none.
`python -m tests.grafts.mutated_folders BACKBONE WORK FIRST LAST` reads those of the seeds, a JSON line each."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native, peft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.formats.description import DESCRIPTION
from polygraft.grafts.formats.read import read
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from tests.grafts.random_tensors import random_tensors

TEXTS = (
    "lora(r=2)",
    "dora(r=2, at=attn.[qv])",
    "ia3",
    "vera(r=4)",
    "prefix(3)",
    "lora(r=2, at=attn.q) + bitfit(at=norm.1)",
)
VALUES: tuple[object, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    10**30,
    1e308,
    "",
    "x",
    "all-linear",
    "(a+)+$",
    "(?:" * 3000,
    "(?R)",
    "a{999}" * 999,
    "\u0000",
    "../../etc/passwd",
    [],
    ["q_proj"],
    ["q_proj", "W_pack"],
    [[1]],
    list(range(5000)),
    {},
    {"(.*)*": 8},
    {"q_proj": 10**9},
    {f"{n}|(.+)+": 4 for n in range(20000)},
    "model\\.layers\\..*",
    ["lm_head", "embed_tokens"],
)
FIELDS = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "bias",
    "peft_type",
    "layers_to_transform",
    "layers_pattern",
    "trainable_token_indices",
    "init_lora_weights",
    "num_virtual_tokens",
    "use_dora",
    "layer_replication",
    "alora_invocation_tokens",
    "auto_mapping",
    "base_model_name_or_path",
    "lora_bias",
)


class Touch:
    """A pickle that runs code when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.canary,)


def mutate(folder: Path, random: Random, canary: Path) -> str:
    """Change the folder in one to three ways; returns their names."""
    chosen = [random.choice((*MUTATIONS,)) for _ in range(random.randint(1, 3))]
    for name in chosen:
        try:
            MUTATIONS[name](folder, random, canary)
        except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError, SafetensorError):
            continue  # another change has left nothing to change in this way
    return " + ".join(chosen)


def _config(folder: Path, random: Random, _other: Path) -> None:
    path = _any(folder, random, peft.CONFIG)  # which another change may have made a link to an endless file
    config = json.loads(path.read_text())
    for _ in range(random.randint(1, 3)):
        config[random.choice((*FIELDS, *config))] = random.choice(VALUES)
    path.write_text(json.dumps(config))


def _without(folder: Path, random: Random, _: Path) -> None:
    path = _any(folder, random, peft.CONFIG)
    config = json.loads(path.read_text())
    del config[random.choice([*config])]
    path.write_text(json.dumps(config))


def _text(folder: Path, random: Random, _: Path) -> None:
    path = _any(folder, random, ".json")
    raw = path.read_bytes()
    path.write_bytes(
        random.choice(
            (
                b"[" * 100_000,
                b'{"a":' * 50_000,
                b"\xff\xfe" + raw,
                raw[: len(raw) // 2],
                raw.replace(b"1", b"NaN"),
                b"",
                b"null",
                raw.replace(b"{", b'{"peft_type": "LORA", ', 1),
                b" " * (6 << 20),
                b'"' + b"x" * 1_000_000 + b'"',
                b"1" * 10_000,
            )
        )
    )


def _bytes(folder: Path, random: Random, _other: Path) -> None:
    path = _any(folder, random, "")
    raw = bytearray(path.read_bytes())
    for _ in range(random.randint(1, 30)):
        raw[random.randrange(min(len(raw), random.choice((8, 400, 10**9))))] = random.randrange(256)
    path.write_bytes(raw)


def _cut(folder: Path, random: Random, _: Path) -> None:
    path = _any(folder, random, "")
    path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])


def _header(folder: Path, random: Random, _: Path) -> None:
    path = _any(folder, random, ".safetensors")
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    entry = header[random.choice([key for key in header if key != "__metadata__"])]
    change = random.choice(("dtype", "shape", "data_offsets"))
    entry[change] = {
        "dtype": random.choice(("I64", "BOOL", "F8_E4M3", "F8_E8M0", "C64", "F4", "nothing", "BF16", "F64")),
        "shape": random.choice(([2**62], [2**33, 2**33], [0], [], [-1], [1] * 5000, entry["shape"][::-1], [10**12, 0])),
        "data_offsets": random.choice(([0, 0], [0, 2**63], [5, 1], [0, len(body)], [-4, 4])),
    }[change]
    made = json.dumps(header).encode()
    length = random.choice((len(made), 0, 2**63, 2**40, len(made) - 1, 50 << 20))
    path.write_bytes(length.to_bytes(8, "little") + made + body)


def _tensors(folder: Path, random: Random, _: Path) -> None:
    path = _any(folder, random, ".safetensors")
    stored = load_file(path)
    key = random.choice(sorted(stored))
    value = stored.pop(key)
    changes: tuple[Callable[[], dict[str, Tensor]], ...] = (
        dict,
        lambda: {key: value / 0},
        lambda: {key: value.to(torch.int64)},
        lambda: {key: value.to(torch.float8_e4m3fn)},
        lambda: {key: value.to(torch.complex64)},
        lambda: {key: value.bool()},
        lambda: {key: value[:0]},
        lambda: {key: value.unsqueeze(0)},
        lambda: {key: value.flatten()},
        lambda: {key: value.new_zeros(())},
        lambda: {key: value, key.replace("base_model.model.", ""): value.clone()},
        lambda: {key: value, f"_orig_mod.{key}": value.clone()},
        lambda: {key: value, "base_model.model.lm_head.weight": value.new_zeros(512, 64)},
        lambda: {key: value, "base_model.model.model.embed_tokens.weight": value.new_zeros(520, 64)},
        lambda: {key: value, f"{key}\u0000": value.clone(), "": value.clone(), "." * 3000: value.clone()},
    )
    save_file(stored | random.choice(changes)(), path)


def _file(folder: Path, random: Random, _: Path) -> None:
    path = _any(folder, random, "")
    raw = path.read_bytes()
    path.unlink()
    outside = folder.parent / f"{folder.name}-outside"
    outside.write_bytes(raw)
    random.choice(
        (
            lambda: os.mkfifo(path),
            path.mkdir,
            lambda: path.symlink_to(outside),
            lambda: path.symlink_to("/dev/zero"),
            lambda: path.symlink_to(path.name),
            lambda: path.symlink_to("/proc/self/mem"),
            lambda: None,
        )
    )()


def _pickled(folder: Path, random: Random, canary: Path) -> None:
    for name in ("adapter_model.bin", "pytorch_adapter.bin", "adapter_model.pt"):
        (folder / name).write_bytes(pickle.dumps(Touch(canary)))
    if random.random() < 0.7:
        weights = folder / peft.WEIGHTS
        weights.unlink()
        if random.random() < 0.5:
            shutil.copy(folder / "adapter_model.bin", weights)


MUTATIONS: dict[str, Callable[[Path, Random, Path], None]] = {
    "config": _config,
    "config again": _config,
    "without": _without,
    "text": _text,
    "bytes": _bytes,
    "cut": _cut,
    "header": _header,
    "tensors": _tensors,
    "tensors again": _tensors,
    "file": _file,
    "pickled": _pickled,
}


def _any(folder: Path, random: Random, suffix: str) -> Path:
    return random.choice(sorted(path for path in folder.iterdir() if path.name.endswith(suffix) and path.is_file()))


def main(backbone: Path, work: Path, first: int, last: int) -> None:
    """A line for each seed: what was changed, what came of it, processor seconds, and MB that the peak grew by."""
    loaded, backbone_files = Backbone.load(backbone, torch.float32), BackboneFiles(backbone)
    made = []
    for text in TEXTS:
        graft = BoundGraft(parse(text), loaded.shape)
        values = random_tensors(graft, seed=1)
        made.append(work / native.save(work, graft, values, backbone=loaded.fingerprint, backbone_files=backbone_files))
    for seed in range(first, last):
        random = Random(seed)
        folder, canary = work / f"seed-{seed}", work / f"canary-{seed}"
        shutil.copytree(random.choice(made), folder)
        for name in {DESCRIPTION, native.WEIGHTS} if random.random() < 0.75 else {peft.CONFIG, peft.WEIGHTS}:
            (folder / name).unlink(missing_ok=True)
        changed = mutate(folder, random, canary)
        peak, begun, outcome = _peak(), time.process_time(), "loaded"
        try:
            read(folder, backbone_files, loaded.fingerprint)
        except FormatError as error:
            outcome = "refused" if len(str(error)) < 2000 else "refused at length"
        except Exception as error:
            outcome = f"{type(error).__name__}: {str(error)[:200]}"
        spent, grown = time.process_time() - begun, (_peak() - peak) / 1024
        if canary.exists():
            outcome = "ran code"
        print(json.dumps([seed, changed, outcome, round(spent, 2), round(grown)]), flush=True)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
