"""The folder that Hugging Face PEFT reads: `adapter_config.json` and `adapter_model.safetensors`, for every method
whose file declares how PEFT keeps it, and for what such a method can stand for (`plain.py`).

The keys are those of peft 0.21's save_pretrained; its loader only warns about missing or unknown ones, here they are
errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import peft_extras, peft_head
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError, check
from polygraft.grafts.formats.files import json_object, tensors
from polygraft.grafts.formats.peft_config import own_graft
from polygraft.grafts.formats.peft_keys import usual
from polygraft.grafts.formats.peft_modules import path, pattern, targets
from polygraft.grafts.formats.peft_tensors import Exchange
from polygraft.grafts.formats.plain import plain
from polygraft.grafts.formats.tensor_file import write_tensors
from polygraft.grafts.grammar import Term, terms, union
from polygraft.grafts.methods.configs import described, flat, layout_of
from polygraft.grafts.methods.exchange import Peft
from polygraft.grafts.methods.registry import find, layouts
from polygraft.grafts.sites import EMBED_SITE, LINEAR, NORMS, ModelShape, Site
from polygraft.grafts.spec import KV, Layers, SpecError, Tokens

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def exportable(graft: BoundGraft, backbone_files: BackboneFiles | None = None) -> bool:
    """Whether PEFT has the graft, or one that computes the same, on whole modules; some only with the backbone's
    files."""
    try:
        _written(graft, None, backbone_files)
    except (FormatError, SpecError):
        return False
    return True


def export(
    folder: Path,
    graft: BoundGraft,
    values: Mapping[str, Tensor],
    *,
    base: str | None = None,
    backbone_files: BackboneFiles | None = None,
) -> None:
    """Write the two files into `folder`; `base` is the backbone's public name, null when not given.

    Raises FormatError for a graft that PEFT has no equal for, or tensors that are not the graft's.
    """
    check(graft, values)
    export_checked(folder, graft, values, base=base, backbone_files=backbone_files)


def export_checked(
    folder: Path,
    graft: BoundGraft,
    values: Mapping[str, Tensor],
    *,
    base: str | None = None,
    backbone_files: BackboneFiles | None = None,
) -> None:
    """The same, of tensors that are known to be the graft's."""
    config, files = _written(graft, values, backbone_files)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(files, folder / WEIGHTS, metadata={"format": "pt"})
    notes = {
        "peft_type": config.pop("peft_type"),
        "task_type": "CAUSAL_LM" if graft.shape.causal else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(notes | config, indent=2) + "\n")


def load(
    folder: Path, shape: ModelShape, backbone_files: BackboneFiles | None = None
) -> tuple[BoundGraft, dict[str, Tensor]]:
    """The graft of a PEFT folder, float32, by our names. That of a fused module (GPT-2's c_attn) becomes one for each
    of its projections, with their rows of what is along its outputs.

    Raises FormatError for pickled weights, a file that is a link out of the folder, a config that asks for more than
    our method, a key that is missing or unknown, a wrong shape, a value that is not finite.
    """
    config = flat(config_of(folder))
    if not isinstance(config.get("peft_type"), str):
        raise FormatError(f"{folder.name}/{CONFIG}: peft_type {config.get('peft_type')!r} is not the name of a method")
    try:
        headed = peft_head.classifies(config)
        config = peft_head.without_head(config) if headed else config
        layout = layout_of(config, stored=True)
        if not _has(layout, shape):
            raise SpecError(f"peft_type: PEFT has no {layout.kind} on {shape.arch}")
        stored = usual(tensors(folder, WEIGHTS), shape)
        head = peft_head.read(stored, shape, backbone_files) if headed else None
        if head is not None:
            stored = {key: value for key, value in stored.items() if key not in head.keys}
        own = BoundGraft(own_graft(layout, config, shape, stored=True), shape)
        _check_separable(layout, own)
        exchange = Exchange(layout, own, backbone_files)
        more, changes, keys = peft_extras.read(layout, config, stored, own, backbone_files)
        whole = BoundGraft(union([*terms(own.spec.method), *more]), shape) if more else own
    except (FormatError, SpecError) as error:
        known = isinstance(error, FormatError) and str(error).startswith(folder.name)
        raise error if known else FormatError(f"{folder.name}: {error}") from None
    try:
        values = exchange.read({key: value for key, value in stored.items() if key not in keys}) | changes
    except (FormatError, SpecError) as error:
        raise FormatError(f"{folder.name}/{WEIGHTS}: {error}") from None
    if head is not None:
        whole, values = BoundGraft(replace(whole.spec, head=head.head), shape), {**values, **head.tensors}
    check(whole, values)
    return whole, values


def _check_separable(layout: Peft, graft: BoundGraft) -> None:
    """Raise FormatError for a method that cannot be split into one for each projection of a fused module."""
    table = architecture(graft.shape.arch)
    for _, site in graft.sites:
        if site.name in LINEAR and len(fused := table.fused_with(site.name)) > 1 and not layout.separable:
            place, parts = path(site, graft.shape), " and ".join(fused)
            raise FormatError(f"target_modules: {layout.kind} of {place}, {parts} here, is not one of each of them")


@dataclass(frozen=True, slots=True)
class _Member:
    """One method of a union: its layout, all its arguments, its layers, and where it stands by the argument that says
    so."""

    layout: Peft
    arguments: Mapping[str, object]
    layers: Layers
    sides: Mapping[str, tuple[Site, ...]]

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for sites in self.sides.values() for site in sites)

    @property
    def fixed(self) -> Mapping[str, object]:
        """What all modules of a config have alike."""
        patterns = self.layout.patterns.values()
        free = {ours for ours, (theirs, _) in self.layout.names.items() if theirs in patterns}
        return {name: value for name, value in self.arguments.items() if name not in {*free, *self.layout.sides}}


def _written(
    whole: BoundGraft, values: Mapping[str, Tensor] | None, backbone_files: BackboneFiles | None
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Config and tensors (none without values), as the method itself or as a plainer one that stands for it, and what
    is trained beside."""
    if whole.head:
        inner = None if values is None else {name: value for name, value in values.items() if name[:5] != "head."}
        config, files = _written(peft_head.bare(whole), inner, backbone_files)
        fields, classifier = peft_head.written(whole, values, config, wraps="target_modules" in config)
        return config | fields, files | classifier
    graft = peft_extras.split(whole)
    own, shape = graft.own, whole.shape
    kept: Mapping[str, Tensor] | None = None if values is None else graft.values(values)
    members = _members(own)
    if members is None:
        simpler = plain(own, kept)
        members = None if simpler is None else _members(simpler[0])
        if simpler is None or members is None:
            raise FormatError(f"peft: {whole.spec.method!r} has no equal in PEFT here; keep the native folder")
        own, kept = simpler
    layout = members[0].layout
    more, files = peft_extras.write(layout, graft, values, backbone_files)
    exchange = Exchange(layout, own, backbone_files)
    return _described(members, shape) | more, files if kept is None else exchange.write(kept) | files


@lru_cache(maxsize=16)  # it is asked twice a graft that is saved, and many have the same slots
def _members(graft: BoundGraft) -> list[_Member] | None:
    """The methods of a union that one config of PEFT can say: one method, whose copies stand at different sites and
    differ in nothing but what single modules may have; else None."""
    try:
        written = terms(graft.spec.method)
        if union(written).slots != graft.spec.slots:
            return None
        found = [member for term in written if (member := _member(term, graft.shape)) is not None]
    except SpecError:
        return None
    if len(found) < len(written) or len({member.layout.method for member in found}) > 1:
        return None
    sites = [site for member in found for site in member.sites]
    alike = all(member.fixed == found[0].fixed for member in found) and len(sites) == len(set(sites))
    separate = len(found) > 1 and (found[0].layout.shared or not found[0].layout.sides)
    return found if alike and not separate else None


def _member(term: Term, shape: ModelShape) -> _Member | None:
    method = find(term.name)
    layout = next((one for one in layouts() if one.method == method.name and one.only is None and one.written), None)
    if layout is None or not _has(layout, shape):
        return None
    given = method.values(term.arguments)
    whole = {name: given.get(name, argument.default) for name, argument in method.arguments.items()}
    sides: dict[str, tuple[Site, ...]] = {}
    for side in layout.sides:
        if whole[side]:
            others = {other: "" for other in layout.sides if other != side}
            alone = BoundGraft(union([Term(term.name, {**term.arguments, **others}, term.layers)]), shape)
            sides[side] = tuple(dict.fromkeys(site for _, site in alone.sites))
    if any(site.name not in (*LINEAR, *NORMS) for sites in sides.values() for site in sites):
        return None
    if not layout.sides and term.layers is not None:
        last = tuple(range(shape.layers))[-len(set(term.layers)) :]
        if layout.topmost is None or tuple(sorted(set(term.layers))) != last:
            return None
    return _Member(layout, whole, term.layers, sides)


def _has(layout: Peft, shape: ModelShape) -> bool:
    """Whether PEFT has the method on this architecture; its virtual tokens need a decoder."""
    table = architecture(shape.arch)
    fits = layout.conv1d or not table.transposed or not layout.sides
    return fits and (shape.causal or bool(layout.sides)) and shape.arch in (layout.only_on or (shape.arch,))


def _described(members: list[_Member], shape: ModelShape) -> dict[str, object]:
    """The config of methods that differ in where they stand and in what patterns can say."""
    first, layout = members[0], members[0].layout
    config: dict[str, object] = {"peft_type": layout.kind, **_fields(first)}
    for pattern_field, changed in layout.patterns.items():
        others = {
            pattern(member.sites, shape, short=True): _fields(member)[changed]
            for member in members[1:]
            if _fields(member)[changed] != config[changed]
        }
        config |= {pattern_field: others} if others else {}
    for index, (side, (key, _)) in enumerate(layout.sides.items()):
        sites = [site for member in members for site in (member.sides.get(side, ()) if index else member.sites)]
        where = targets(sites, shape, layered=layout.layered and not index) if sites else {"target_modules": []}
        if where is None:
            just = "|".join(dict.fromkeys(site.name for site in sites))
            raise FormatError(f"peft: no target_modules of {shape.arch} mean just {just!r}; keep the native folder")
        config |= {key if name == "target_modules" else name: value for name, value in where.items()}
    if layout.topmost is not None:
        config[layout.topmost] = shape.layers if first.layers is None else len(set(first.layers))
    elif not layout.sides:
        config |= _sizes(layout.method, shape)
    transposed = architecture(shape.arch).transposed and layout.kind == "LORA"
    return config | ({"fan_in_fan_out": True} if transposed else {})


def _fields(member: _Member) -> dict[str, object]:
    return described(member.layout, {k: v for k, v in member.arguments.items() if k not in member.layout.sides})


def _sizes(method: str, shape: ModelShape) -> Mapping[str, object]:
    """What PEFT wants to know of the backbone for rows of its keys and values, or of its input."""
    slots = find(method).build({})[0]
    if any(isinstance(slot, Tokens) and slot.mode == "replace" for slot in slots):
        return {"target_modules": path(Site(0, EMBED_SITE), shape)}
    rows = any(isinstance(slot, KV) for slot in slots)
    return {
        "token_dim": shape.kv_width if rows else shape.hidden,
        "num_attention_heads": shape.kv_heads if rows else shape.heads,
        "num_layers": shape.layers,
        "num_transformer_submodules": 1,
    }


def config_of(folder: Path) -> Mapping[str, object]:
    """Its adapter_config.json, which other libraries call so, too."""
    return json_object(folder, CONFIG)
