"""PEFT's folder of a classifier (task_type SEQ_CLS): the head that transformers' class for sequences has, saved whole
beside the method's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError, sized
from polygraft.grafts.formats.peft_keys import ROOT
from polygraft.grafts.head import Head, HeadKind
from polygraft.grafts.methods.configs import names
from polygraft.grafts.methods.exchange import Config
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError

if TYPE_CHECKING:
    from torch import Tensor

TASK = "SEQ_CLS"
MODULES = ("classifier", "score")  # that PEFT saves of any such model
# Our names, and those of transformers' classes.
_KEYS: Mapping[HeadKind, Mapping[str, str]] = {
    "linear": {"weight": "score.weight"},
    "pooled": {"weight": "classifier.weight", "bias": "classifier.bias"},
    "dense": {
        "dense.weight": "classifier.dense.weight",
        "dense.bias": "classifier.dense.bias",
        "weight": "classifier.out_proj.weight",
        "bias": "classifier.out_proj.bias",
    },
}

Values = Mapping[str, "Tensor"]


def classifies(config: Config) -> bool:
    return config.get("task_type") == TASK


def without_head(config: Config) -> dict[str, object]:
    """The config without the modules that are a head's."""
    saved = [name for name in names(config, "modules_to_save") if name not in MODULES]
    return {**config, "modules_to_save": saved or None}


def bare(graft: BoundGraft) -> BoundGraft:
    """The graft without its head."""
    return BoundGraft(replace(graft.spec, head=None), graft.shape)


def written(
    graft: BoundGraft, values: Values | None, config: Config, *, wraps: bool
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The fields and tensors of the head to add to those of the bare graft's config; `wraps`: its method wraps modules,
    else it is of virtual tokens alone."""
    assert graft.spec.head is not None
    fields: dict[str, object] = {"task_type": TASK, "modules_to_save": [*names(config, "modules_to_save"), *MODULES]}
    keys = _KEYS[graft.spec.head.kind]
    front = ROOT if wraps else "base_model."
    return fields, {} if values is None else {front + theirs: values[f"head.{ours}"] for ours, theirs in keys.items()}


@dataclass(frozen=True, slots=True)
class StoredHead:
    """A head as read from a file, where its tensors have these `keys`."""

    head: Head
    tensors: Mapping[str, Tensor]
    keys: frozenset[str]


def read(stored: Values, shape: ModelShape, backbone_files: BackboneFiles | None) -> StoredHead:
    """The head in a file; its labels are named as transformers does without names.

    Raises SpecError for an architecture that classifies no texts, FormatError for what is missing or misshapen.
    """
    kind = shape.head_kind
    if kind is None:
        raise SpecError(f"task_type: {TASK} on {shape.arch}, which classifies no texts here")
    places = {ours: _place(theirs, stored) for ours, theirs in _KEYS[kind].items()}
    classes = len(stored[places["weight"]])
    head = Head(tuple(f"LABEL_{number}" for number in range(classes)), kind)
    found = {}
    for part, (size, _, _) in head.parts(shape.hidden).items():
        if part in places:
            found[f"head.{part}"] = sized(places[part], stored[places[part]], size).float()
        else:
            found[f"head.{part}"] = _pooler(backbone_files, part).float()
    return StoredHead(head, found, frozenset(places.values()))


def _place(key: str, stored: Values) -> str:
    for front in (ROOT, "base_model."):
        if front + key in stored:
            return front + key
    raise FormatError(f"{ROOT}{key}: is missing, which {TASK} saves")


def _pooler(backbone_files: BackboneFiles | None, part: str) -> Tensor:
    """BERT's own, which PEFT leaves in the model."""
    key = (
        None
        if backbone_files is None
        else next((key for key in backbone_files.files if f".{key}".endswith(f".pooler.{part}")), None)
    )
    if backbone_files is None or key is None:
        raise FormatError(f"pooler.{part}: BERT's classifier reads it; name a backbone's folder that has it")
    return backbone_files.wide(key)
