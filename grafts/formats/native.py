"""The native graft folder: `graft.json` (what it is and what it grows on) beside `graft.safetensors` (its float32
tensors)."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from polygraft.grafts.sites import ModelShape
from polygraft.grafts.sizes import tensors
from polygraft.grafts.spec import GraftSpec, SpecError

SCHEMA = 1


class FormatError(ValueError):
    """A graft folder that cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class StoredGraft:
    """A graft as read from its folder."""

    id: str
    spec: GraftSpec
    tensors: Mapping[str, Tensor]
    backbone: str


def graft_id(spec: GraftSpec, values: Mapping[str, Tensor], backbone: str) -> str:
    """Digest of tensors, slots and backbone fingerprint: the graft's identity and the key of every weight cache."""
    digest = sha256(json.dumps([asdict(slot) for slot in spec.slots], sort_keys=True).encode() + backbone.encode())
    for name in sorted(values):
        digest.update(name.encode())
        digest.update(values[name].detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def save(root: Path, spec: GraftSpec, values: Mapping[str, Tensor], *, shape: ModelShape, backbone: str) -> str:
    """Write the graft under `root/<id>` and return its id; whole or not at all, and once for the same graft."""
    kept = {name: value.detach().to(torch.float32).contiguous().clone() for name, value in values.items()}
    identity = graft_id(spec, kept, backbone)
    folder = root / identity
    if folder.exists():
        return identity
    root.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=root))
    try:
        save_file(kept, draft / "graft.safetensors")
        described = {
            "schema": SCHEMA,
            "id": identity,
            "backbone": backbone,
            "shape": asdict(shape),
            "spec": json.loads(spec.to_json()),
        }
        with open(draft / "graft.json", "w") as file:
            json.dump(described, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.rename(draft, folder)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if not folder.exists():
            raise
    return identity


def load(folder: Path, *, shape: ModelShape, backbone: str) -> StoredGraft:
    """Read a graft for a backbone; raises FormatError for a foreign backbone, a wrong tensor or a value that is not
    finite."""
    described = _described(folder)
    if described.get("schema") != SCHEMA:
        raise FormatError(f"{folder.name}/graft.json: schema {described.get('schema')!r} is not {SCHEMA}")
    if described.get("backbone") != backbone:
        raise FormatError(f"{folder.name}: grown on backbone {described.get('backbone')!r}, not on {backbone!r}")
    try:
        spec = GraftSpec.from_json(json.dumps(described.get("spec")))
        values = load_file(folder / "graft.safetensors")
    except (SpecError, SafetensorError, OSError) as error:
        raise FormatError(f"{folder.name}: {error}") from None
    check(spec, values, shape)
    return StoredGraft(str(described["id"]), spec, values, backbone)


def check(spec: GraftSpec, values: Mapping[str, Tensor], shape: ModelShape) -> None:
    """Raise FormatError unless `values` are just the spec's tensors, of the right shapes and finite."""
    expected = {tensor.name: tensor.shape for tensor in tensors(spec, shape)}
    if expected.keys() != values.keys():
        odd = sorted(expected.keys() ^ values.keys())
        raise FormatError(f"tensors: {odd[:5]} are missing or unknown ({len(odd)} in all)")
    for name, size in expected.items():
        if tuple(values[name].shape) != size:
            raise FormatError(f"{name}: shape {tuple(values[name].shape)} is not {size}")
        if not bool(torch.isfinite(values[name]).all()):
            raise FormatError(f"{name}: holds values that are not finite")


def _described(folder: Path) -> dict[str, object]:
    try:
        value = json.loads((folder / "graft.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise FormatError(f"{folder.name}/graft.json: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{folder.name}/graft.json: not an object")
    return value
