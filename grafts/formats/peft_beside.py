"""What a PEFT config trains beside its method: whole modules (`modules_to_save`) and biases (`bias`), as changes of the
backbone's own: a dense dW for a projection, a scale and a shift for a norm, a shift for a bias."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polygraft.grafts.formats.check import FormatError, sized
from polygraft.grafts.formats.peft_modules import candidates, path
from polygraft.grafts.formats.stock import Stock
from polygraft.grafts.grammar import Term, union
from polygraft.grafts.methods.configs import names
from polygraft.grafts.methods.exchange import Config
from polygraft.grafts.sites import LINEAR, ModelShape, Site
from polygraft.grafts.spec import SpecError

Values = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Change:
    """What one method does at a site, its tensors by slot and part, and the keys that it is read from."""

    method: str
    site: Site
    values: Mapping[tuple[int, str], Tensor]
    keys: tuple[str, ...]


def beside(
    config: Config, stored: Values, shape: ModelShape, stock: Stock | None, first: int
) -> tuple[list[Term], dict[str, Tensor], set[str]]:
    """Terms to add to the graft, whose slots count from `first`, their tensors, and the keys that they are read from.

    Raises SpecError for a module that no op replaces, FormatError for one that is not in the file.
    """
    saved, bias = names(config, "modules_to_save"), config.get("bias") or "none"
    if not saved and bias == "none":
        return [], {}, set()
    if stock is None:
        raise FormatError("modules_to_save, bias: they are kept whole in PEFT's files; name the backbone's folder")
    found = [*_modules(saved, stored, stock)]
    if bias != "none":
        known = {key for change in found for key in change.keys}  # a whole module's bias is among them
        found += _biases({key: value for key, value in stored.items() if key not in known}, stock)
    read = {key for change in found for key in change.keys}
    terms: list[Term] = []
    values: dict[str, Tensor] = {}
    for change in found:
        slot = first + sum(len(union([term]).slots) for term in terms)
        terms.append(Term(change.method, {"at": change.site.name}, (change.site.layer,)))
        values |= {f"{slot + index}.{change.site}.{part}": value for (index, part), value in change.values.items()}
    return terms, values, read | {key for one in read for key in _again(one, stored)}


def _modules(saved: list[str], stored: Values, stock: Stock) -> Iterator[_Change]:
    chosen: set[Site] = set()
    for name in saved:
        sites = [site for site in candidates(stock.shape) if path(site, stock.shape).endswith(name)]  # as PEFT does
        if not sites:
            raise SpecError(f"modules_to_save: {name!r} is no projection and no norm; others are not replaced")
        chosen.update(sites)
    for site in sorted(chosen):
        key = f"base_model.model.{path(site, stock.shape)}"
        weight, bias = stored.get(f"{key}.weight"), stored.get(f"{key}.bias")
        if weight is None:
            raise FormatError(f"{key}.weight: is missing")
        if site.name in LINEAR:
            yield _dense(site, weight, stock, f"{key}.weight")
            if bias is not None:
                yield _shift(site, bias, stock, f"{key}.bias")
        else:
            yield _norm(site, weight.float(), bias, stock, key)


def _again(key: str, stored: Values) -> Iterator[str]:
    """The keys under which PEFT has the biases of a whole module once more, with `bias` "all": as they were, which no
    forward of it reads, and as they are. Raises FormatError where these are others."""
    module, _, part = key.rpartition(".")
    for wrapper in ("original_module", "modules_to_save"):
        if (again := f"{module}.{wrapper}.{part}") in stored:
            sized(again, stored[again], tuple(stored[key].shape))
            if wrapper == "modules_to_save" and not stored[again].equal(stored[key]):
                raise FormatError(f"{again}: is not {key}, which it says again")
            yield again


def _dense(site: Site, weight: Tensor, stock: Stock, key: str) -> _Change:
    """Child-tuning has the whole dW; its throws of dice are of training."""
    change = stock.part(sized(key, weight, stock.shapes(site)[0]), site).float() - stock.weight(site)
    return _Change("child-tuning", site, {(0, "child"): change, (0, "child_dice"): torch.zeros(2)}, (key,))


def _norm(site: Site, weight: Tensor, bias: Tensor | None, stock: Stock, key: str) -> _Change:
    """c + w' = g (c + w), and b' = g b + s."""
    own, b, offset = stock.norm(site)
    g = (offset + sized(f"{key}.weight", weight, tuple(own.shape))) / (offset + own)
    if b is None:
        return _Change("ln-tuning", site, {(0, "g"): g}, (f"{key}.weight",))
    if bias is None:
        raise FormatError(f"{key}.bias: is missing")
    s = sized(f"{key}.bias", bias.float(), tuple(b.shape)) - g * b
    return _Change("ssf", site, {(0, "g"): g, (0, "b"): s}, (f"{key}.weight", f"{key}.bias"))


def _biases(stored: Values, stock: Stock) -> Iterator[_Change]:
    for site in candidates(stock.shape):
        for end in ("bias", "base_layer.bias"):
            key = f"base_model.model.{path(site, stock.shape)}.{end}"
            if key in stored:
                yield _shift(site, stored[key], stock, key)


def _shift(site: Site, bias: Tensor, stock: Stock, key: str) -> _Change:
    if site.name in LINEAR:
            own, bias = stock.bias(site), stock.part(sized(key, bias, stock.shapes(site)[1]), site)
    else:
        weight, own, _ = stock.norm(site)
        sized(key, bias, tuple(weight.shape))
    change = bias.float() if own is None else bias.float() - own
    return _Change("bitfit", site, {(0, "b"): change}, (key,))
