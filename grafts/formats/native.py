"""The native graft folder: `graft.json` (what it is and what it grows on) and `graft.safetensors` (its tensors, in
float32)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import peft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError, check
from polygraft.grafts.formats.description import DESCRIPTION
from polygraft.grafts.formats.files import json_object, tensors
from polygraft.grafts.formats.tensor_file import write_tensors
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import GraftSpec, Slot, SpecError
from polygraft.kernels.common.atomic import whole_folder

SCHEMA = 1
WEIGHTS = "graft.safetensors"


@dataclass(frozen=True, slots=True)
class StoredGraft:
    """A graft as read from its folder."""

    id: str
    graft: BoundGraft
    tensors: Mapping[str, Tensor]
    backbone: str


def graft_id(spec: GraftSpec, values: Mapping[str, Tensor], backbone: str) -> str:
    """Digest of tensors, slots and backbone fingerprint: the graft's identity and the key of every weight cache."""
    slots = GraftSpec.from_json(spec.to_json()).slots  # as they are read back: 2.0 where 2 was given
    digest = sha256(json.dumps([_said(slot) for slot in slots], sort_keys=True).encode() + backbone.encode())
    if spec.head is not None:
        digest.update(json.dumps(asdict(spec.head), sort_keys=True).encode())
    for name in sorted(values):
        digest.update(name.encode())
        digest.update(values[name].detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def save(
    root: Path,
    graft: BoundGraft,
    values: Mapping[str, Tensor],
    *,
    backbone: str,
    base: str | None = None,
    backbone_files: BackboneFiles | None = None,
) -> str:
    """Write the graft under `root/<id>` and return its id; whole and on disk or not at all, and once for one graft.

    PEFT's files lie in the same folder where PEFT has the method, with `base` as the backbone's public name; for some
    methods the backbone's files must be at hand. Raises OSError, and FormatError for tensors that `load` would refuse.
    """
    kept = {name: value.detach().to("cpu", torch.float32).contiguous().clone() for name, value in values.items()}
    check(graft, kept)
    identity = graft_id(graft.spec, kept, backbone)
    folder = root / identity
    if folder.exists():
        return identity
    described = {
        "schema": SCHEMA,
        "id": identity,
        "backbone": backbone,
        "shape": asdict(graft.shape),
        "spec": json.loads(graft.spec.to_json()),
    }
    try:
        with whole_folder(folder) as draft:
            write_tensors(kept, draft / WEIGHTS)
            (draft / DESCRIPTION).write_text(json.dumps(described, indent=1))
            if peft.exportable(graft, backbone_files):
                peft.export_checked(draft, graft, kept, base=base, backbone_files=backbone_files)
    except OSError:
        if not folder.exists():  # else another process wrote the same graft first
            raise
    return identity


def load(folder: Path, *, shape: ModelShape, backbone: str) -> StoredGraft:
    """Read a graft for a backbone; raises FormatError for a foreign backbone, a wrong tensor, a value that is not
    finite, or contents that are not those the id was made of."""
    described = json_object(folder, DESCRIPTION)
    if described.get("schema") != SCHEMA:
        raise FormatError(f"{folder.name}/{DESCRIPTION}: schema {described.get('schema')!r} is not {SCHEMA}")
    if described.get("backbone") != backbone:
        raise FormatError(f"{folder.name}: grown on backbone {described.get('backbone')!r}, not on {backbone!r}")
    try:
        graft = BoundGraft(GraftSpec.from_json(json.dumps(described.get("spec"))), shape)
        values = tensors(folder, WEIGHTS)
    except SpecError as error:
        raise FormatError(f"{folder.name}: {error}") from None
    check(graft, values)
    identity = graft_id(graft.spec, values, backbone)
    if identity != described.get("id"):
        raise FormatError(f"{folder.name}: its contents have the id {identity}, not {described.get('id')!r}")
    return StoredGraft(identity, graft, values, backbone)


def size(folder: Path) -> int:
    """Bytes of a graft's files."""
    return sum(file.stat().st_size for file in folder.iterdir())


def _said(slot: Slot) -> Mapping[str, object]:
    """The slot's op and the fields that are not at their defaults, so that a field added later changes no id."""
    said = asdict(slot)
    return {f.name: said[f.name] for f in fields(slot) if getattr(slot, f.name) != f.default or f.name == "op"}
