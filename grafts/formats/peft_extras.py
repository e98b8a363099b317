"""PEFT's extras: what a config trains in addition to its method, whole modules (`modules_to_save`), biases (`bias`)
and rows of the embeddings (`trainable_token_indices`), as terms of a union; and back where a config means just
those."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import peft_tokens, peft_vocabulary
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError, sized
from polygraft.grafts.formats.peft_changes import SHIFT, Change, Trained, change_of
from polygraft.grafts.formats.peft_keys import ROOT
from polygraft.grafts.formats.peft_modules import candidates, path
from polygraft.grafts.grammar import Term, terms, union
from polygraft.grafts.methods.configs import names
from polygraft.grafts.methods.exchange import TOKENS_FIELD, Config, Peft
from polygraft.grafts.sites import ModelShape, Site, gathered, resolve
from polygraft.grafts.spec import SpecError, Tokens

if TYPE_CHECKING:
    from torch import Tensor

Values = Mapping[str, "Tensor"]
_NO_STOCK = "modules_to_save, bias: they are kept whole in PEFT's files; name the backbone's folder"


def read(
    layout: Peft, config: Config, stored: Values, own: BoundGraft, backbone_files: BackboneFiles | None
) -> tuple[list[Term], dict[str, Tensor], set[str]]:
    """Terms to add to the method's `own` graft, their tensors, and the keys that they alone are read from.

    Raises SpecError for a module that no op replaces, FormatError for one that is not in the file.
    """
    edit, rows, places = peft_vocabulary.read(layout, config, stored, own.shape, backbone_files)
    config = peft_vocabulary.of_layers(config, own.shape)
    more = extra_terms(config, own, backbone_files)
    values, keys = _changes(config, stored, own, more, backbone_files)
    keys |= places
    if more and more[-1].name == peft_tokens.METHOD:
        tokens, places = peft_tokens.read(config, stored, backbone_files)
        values[f"{len(own.spec.slots) + len(more) - 1}.{peft_tokens.EMBED}.p"] = tokens
        keys |= places
    if edit is not None and rows is not None:
        more.append(edit)
        values[f"{len(own.spec.slots) + len(more) - 1}.{peft_tokens.EMBED}.p"] = rows
    shifts, places = _shifts(layout, stored, own, backbone_files)
    for term in _shift_terms(shifts, own.shape):
        more.append(term)
        index = len(own.spec.slots) + len(more) - 1
        values |= {f"{index}.{site}.b": shifts[site] for site in resolve(union([term]).slots[0], own.shape)}
    return more, values, keys | places


def _shifts(
    layout: Peft, stored: Values, own: BoundGraft, backbone_files: BackboneFiles | None
) -> tuple[dict[Site, Tensor], set[str]]:
    """What PEFT's method adds to the outputs of its modules beside what our method is, where that is not 0."""
    found: dict[Site, Tensor] = {}
    keys: set[str] = set()
    for index, site in own.sites if layout.shift is not None else ():
        assert layout.shift is not None
        place = path(site, own.shape)

        def number(end: str, site: Site = site) -> Tensor | None:
            if backbone_files is None:
                raise FormatError(_NO_STOCK)
            return backbone_files.weight(site) if end == "weight" else backbone_files.bias(site)

        try:
            made = layout.shift(stored, ROOT + place, own.spec.slots[index], number)
        except (KeyError, RuntimeError) as error:
            raise FormatError(f"{place}: what changes its bias is missing or misshapen: {error}") from None
        if made is not None:
            b, read_from = made
            keys |= read_from
            width = own.shape.dims(site.name)[1]
            b = b[own.shape.rows(site.name)] if len(b) > width else b
            if bool(b.count_nonzero()):
                found[site] = sized(f"{place}: a change of its bias", b, (width,)).float()
    return found, keys


def job_terms(layout: Peft, own: BoundGraft, backbone_files: BackboneFiles) -> list[Term]:
    """What a job's method trains of biases in PEFT, as BitFit at the sites that have one."""
    sites = dict.fromkeys(site for _, site in own.sites) if layout.trains_biases else ()
    return _shift_terms([site for site in sites if backbone_files.biased(site)], own.shape)


def _shift_terms(sites: Iterable[Site], shape: ModelShape) -> list[Term]:
    return [SHIFT.at(at, layers) for _, at, layers in gathered([(site, None) for site in sites], shape)]


def extra_terms(config: Config, own: BoundGraft, backbone_files: BackboneFiles | None) -> list[Term]:
    """What a config trains beside the method's `own` graft, as terms of one slot each, the edited rows last.

    Raises SpecError for a module that no op replaces, FormatError where the backbone's files are asked for.
    """
    trained = _trained(config, own, backbone_files)
    placed = [] if trained is None else [(site, one) for site, _, changes in trained.sites() for one in changes]
    more = [change.at(at, layers) for change, at, layers in gathered(placed, own.shape)]
    edited = peft_tokens.term(config, backbone_files)
    return more if edited is None else [*more, edited]


def _trained(config: Config, own: BoundGraft, backbone_files: BackboneFiles | None) -> Trained | None:
    """The whole modules and biases; None where there are none."""
    saved, bias = names(config, "modules_to_save"), str(config.get("bias") or "none")
    if not saved and bias == "none":
        return None
    if bias not in ("none", "all") and not bias.endswith("_only"):
        raise SpecError(f"bias: {bias!r} is not none, all or the method's name with _only")
    if backbone_files is None:
        raise FormatError(_NO_STOCK)
    return Trained(backbone_files, _wrapped(own), _saved(saved, own.shape), bias)


def _changes(
    config: Config, stored: Values, own: BoundGraft, more: list[Term], backbone_files: BackboneFiles | None
) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors of the terms that change whole modules and biases, and their keys."""
    trained = _trained(config, own, backbone_files)
    if trained is None:
        return {}, set()
    found: dict[tuple[Site, str], Values] = {}
    keys = _said_again(trained, stored)
    for site, ends, changes in trained.sites():
        numbers = trained.own(site, ends)
        places = {end: _key(f"{trained.key(site)}.{end}", stored) for end in ends}
        kept = {end: sized(key, stored[key], tuple(numbers[end].shape)) for end, key in places.items()}
        for change in changes:
            found[site, change.method] = change.read(trained.seen(numbers, site), trained.seen(kept, site))
        keys |= {*places.values()}
    values: dict[str, Tensor] = {}
    for index, term in enumerate(more, len(own.spec.slots)):
        if term.name != peft_tokens.METHOD:
            for site in resolve(union([term]).slots[0], own.shape):
                values |= {f"{index}.{site}.{part}": value.float() for part, value in found[site, term.name].items()}
    return values, keys


@dataclass(frozen=True, slots=True)
class SplitGraft:
    """A graft as the method's `own` part, whose slots have these `numbers` in the whole, and PEFT's extras: `changes`
    of whole modules and biases, each with the number of the slot that makes it, and the slot that edits the embeddings,
    with its number."""

    own: BoundGraft
    numbers: tuple[int, ...]
    changes: Mapping[tuple[Site, Change], int]
    edits: tuple[int, Tokens] | None = None

    def values(self, values: Values) -> dict[str, Tensor]:
        """The own graft's."""
        places = {str(number): index for index, number in enumerate(self.numbers)}
        parts = ((name.partition("."), value) for name, value in values.items())
        return {f"{places[slot]}.{rest}": value for (slot, _, rest), value in parts if slot in places}


@lru_cache(maxsize=16)  # as `_members` of peft.py
def split(graft: BoundGraft) -> SplitGraft:
    """The method is what PEFT has not among its extras; where there is nothing such, it is the first term."""
    spec, shape = graft.spec, graft.shape
    whole = SplitGraft(graft, tuple(range(len(spec.slots))), {})
    try:
        built = [(term, union([term]).slots) for term in terms(spec.method)]
        places = [[(site, slot) for slot in slots for site in resolve(slot, shape)] for _, slots in built]
    except SpecError:
        return whole
    if tuple(slot for _, slots in built for slot in slots) != spec.slots:
        return whole
    placed = [[(site, change_of(slot, site)) for site, slot in those] for those in places]
    edits = [slots[0] if peft_tokens.edits(slots[0]) else None for _, slots in built]
    changed = [all(change is not None for _, change in those) for those in placed]
    free = [edit is not None or every for edit, every in zip(edits, changed, strict=True)]
    if all(free):
        free = [term.name != built[0][0].name for term, _ in built]
    own: list[Term] = []
    numbers: list[int] = []
    changes: dict[tuple[Site, Change], int] = {}
    edited: tuple[int, Tokens] | None = None
    first = 0
    for (term, slots), edit, those, loose in zip(built, edits, placed, free, strict=True):
        if not loose:
            own.append(term)
            numbers += range(first, first + len(slots))
        elif edit is not None:
            edited = (first, edit)
        else:
            for site, change in those:
                if change is None or (site, change) in changes:
                    return whole
                changes[site, change] = first  # each of these methods has one slot
        first += len(slots)
    return SplitGraft(BoundGraft(union(own), shape), tuple(numbers), changes, edited) if changes or edited else whole


def write(
    layout: Peft, graft: SplitGraft, values: Values | None, backbone_files: BackboneFiles | None
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Fields of the config and tensors (none without `values`); raises FormatError where none mean just the changes."""
    fields, files = _changed(layout, graft, values, backbone_files) if graft.changes else ({}, {})
    if graft.edits is None:
        return fields, files
    if not layout.edits_tokens:
        raise FormatError(f"{TOKENS_FIELD}: is not written with {layout.kind}; keep the native folder")
    number, slot = graft.edits
    rows = None if values is None else values[f"{number}.{peft_tokens.EMBED}.p"]
    more, edited = peft_tokens.write(slot, rows, backbone_files)
    return fields | more, files | edited


def _changed(
    layout: Peft, graft: SplitGraft, values: Values | None, backbone_files: BackboneFiles | None
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Those of whole modules and biases."""
    if backbone_files is None:
        raise FormatError(_NO_STOCK)
    trained = _fitting(layout, graft, backbone_files)
    fields: dict[str, object] = {"modules_to_save": _named(trained.saved, backbone_files) or None, "bias": trained.bias}
    fields = fields if layout.biases else {"modules_to_save": fields["modules_to_save"]}
    if values is None:
        return fields, {}
    modules: dict[str, dict[str, Tensor]] = {}  # each of one site's numbers or of several's
    files: dict[str, Tensor] = {}
    for site, ends, changes in trained.sites():
        own = trained.own(site, ends)
        seen, module = trained.seen(own, site), modules.setdefault(trained.key(site), own)
        for change in changes:
            front = f"{graft.changes[site, change]}.{site}."
            ours = {name.removeprefix(front): value for name, value in values.items() if name.startswith(front)}
            trained.put(module, site, change.write(seen, ours))
        files |= {f"{trained.key(site)}.{end}": module[end] for end in ends}
    files |= {key: files[of].clone() for key, of in trained.again().items()}
    return fields, files | {
        key: backbone_files.wide(of) for key, of in {**trained.unused(), **trained.elsewhere()}.items()
    }


def _fitting(layout: Peft, graft: SplitGraft, backbone_files: BackboneFiles) -> Trained:
    """What trains just the changes."""
    if not layout.sides:
        raise FormatError(f"modules_to_save, bias: are not written with {layout.kind}; keep the native folder")
    wrapped = _wrapped(graft.own)
    saved = frozenset(site for site, change in graft.changes if change is not SHIFT)
    if both := sorted(wrapped & saved):
        where = path(both[0], backbone_files.shape)
        raise FormatError(f"modules_to_save: PEFT has either the method or a whole {where}; keep the native folder")
    words = ("none", f"{layout.kind.lower()}_only", "all") if layout.biases else ("none",)
    tried = [Trained(backbone_files, wrapped, saved, word) for word in words]
    trained = min(tried, key=lambda one: len(one.changes() ^ graft.changes.keys()))
    odd = [(site, change.method) for site, change in trained.changes() ^ graft.changes.keys()]
    if odd:
        site, method = min(odd)
        more = any((site, method) == (place, change.method) for place, change in trained.changes())
        said = f"trains {method} at {site}, too" if more else f"has no {method} at {site}"
        raise FormatError(f"modules_to_save, bias: PEFT {said} (bias {trained.bias!r}); keep the native folder")
    return trained


def _wrapped(own: BoundGraft) -> frozenset[Site]:
    return frozenset(site for _, site in own.sites)


def _saved(saved: list[str], shape: ModelShape) -> frozenset[Site]:
    """The sites of the modules that a list names by the ends of their paths, as PEFT does."""
    found: set[Site] = set()
    for name in saved:
        sites = [site for site in candidates(shape) if path(site, shape).endswith(name)]
        if not sites:
            raise SpecError(f"modules_to_save: {name!r} is no projection and no norm; others are not replaced")
        found.update(sites)
    return frozenset(found)


def _named(saved: frozenset[Site], backbone_files: BackboneFiles) -> list[str]:
    """The fewest last parts of each module's path that no other module's ends with."""
    every = {name.rpartition(".")[0] for name in backbone_files.files}
    chosen = {path(site, backbone_files.shape) for site in saved}
    found: dict[str, None] = {}
    for place in (path(site, backbone_files.shape) for site in sorted(saved)):
        parts = place.split(".")
        ends = (".".join(parts[first:]) for first in reversed(range(len(parts))) if not parts[first].isdigit())
        found[next(end for end in ends if not any(other.endswith(end) for other in every - chosen))] = None
    return [*found]


def _key(key: str, stored: Values) -> str:
    """The one that is there; PEFT's earlier versions did not name what is wrapped."""
    found = next((one for one in (key, key.replace(".base_layer.", ".")) if one in stored), None)
    if found is None:
        raise FormatError(f"{key}: is missing")
    return found


def _said_again(trained: Trained, stored: Values) -> set[str]:
    """The keys that say more than those of the changes; raises FormatError where one says another thing."""
    for key, of in trained.again().items():
        if key in stored and of in stored and not sized(key, stored[key], tuple(stored[of].shape)).equal(stored[of]):
            raise FormatError(f"{key}: is not {of}, which it says again")
    for key, of in {**trained.unused(), **trained.elsewhere()}.items():
        if key in stored:
            own = trained.backbone_files.wide(of)
            same = sized(key, stored[key], tuple(own.shape)).to(own.dtype).equal(own)
            if not same and key in trained.elsewhere():
                raise FormatError(f"{key}: is not the backbone's, and no op of ours changes it")
    return {key for key in (*trained.again(), *trained.unused(), *trained.elsewhere()) if key in stored}
