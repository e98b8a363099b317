"""Whether a folder can be a backbone: its model is one that runs here, and its files hold exactly that model's tensors.

transformers fills what is missing with random numbers, another draw each time, and leaves out what it does not know;
here both are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from polygraft.grafts.architectures.declare import Architecture
from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError

if TYPE_CHECKING:
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

_FLOATS = ("F64", "F32", "F16", "BF16")
_NAMED = 5  # tensors that a message names


class BackboneError(ValueError):
    """A backbone that cannot be had; the message names it and says what to do."""


def checked(folder: Path) -> Path:
    """`folder`, if a backbone can be loaded from it: its config, and the names, types and shapes of its tensors, are
    compared without reading the weights. Raises BackboneError."""
    tensors, config = check_kind(folder), read_config(folder)
    shape = ModelShape.from_config(config)
    check_loading(_compared(shape, config, tensors, folder), shape, folder)
    return folder


def check_kind(folder: Path) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor in the folder's files, if they and its config are of a kind that runs here: what
    can be told at once and without torch. Weights in pickle files are never read. Raises BackboneError."""
    _check_supported(read_config(folder), folder)
    if not (folder / "tokenizer.json").is_file():
        raise BackboneError(f"backbone: {folder} holds no tokenizer.json")
    tensors = _headers(folder)
    packed = sorted(name for name, (kind, _) in tensors.items() if name.endswith(".weight") and kind not in _FLOATS)
    if packed:
        kind, _ = tensors[packed[0]]
        raise BackboneError(f"backbone: {folder}: {_names(packed)} hold {kind}; convert the model to bf16 or float32")
    return tensors


def read_config(folder: Path) -> Mapping[str, object]:
    """config.json. Raises BackboneError where there is none that can be read."""
    path = folder / "config.json"
    if not path.is_file():
        raise BackboneError(f"backbone: {folder} holds no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"backbone: {path} cannot be read: {str(error)[:200]}") from None
    if not isinstance(config, dict):
        raise BackboneError(f"backbone: {path} is not a JSON object")
    return config


def model_class(shape: ModelShape, config: Mapping[str, object]) -> type[_BaseAutoModelClass]:
    """The transformers class that loads the backbone with its head, or without one if its files hold none."""
    import transformers

    classes = config.get("architectures")
    headless = not shape.causal and isinstance(classes, list) and all(str(name).endswith("Model") for name in classes)
    found: type[_BaseAutoModelClass] = getattr(transformers, "AutoModel" if headless else architecture(shape.arch).auto)
    return found


def check_loading(found: Mapping[str, object], shape: ModelShape, folder: Path) -> None:
    """Raise BackboneError for what `from_pretrained(output_loading_info=True)` has found missing, unexpected or
    misshapen."""
    table = architecture(shape.arch)
    wrong = [(str(name), was, wants) for name, was, wants in found["mismatched_keys"]]  # type: ignore[attr-defined]
    for name, was, wants in sorted(wrong):
        raise BackboneError(
            f"backbone: {folder}: {name} is {list(was)} in the files, {list(wants)} by config.json; "
            "both must be of one model"
        )
    if missing := _read(found["missing_keys"], table):
        raise BackboneError(
            f"backbone: {folder} has no {_names(missing)}, which its config.json asks for; complete its files"
        )
    if unknown := _read(found["unexpected_keys"], table):
        raise BackboneError(
            f"backbone: {folder} holds {_names(unknown)}, of which its config.json knows nothing; "
            "files and config must be of one model"
        )


def _check_supported(config: Mapping[str, object], folder: Path) -> None:
    for name in ("quantization_config", "compression_config"):
        if (quantised := config.get(name)) is not None:
            method = quantised.get("quant_method", "") if isinstance(quantised, dict) else quantised
            raise BackboneError(
                f"backbone: {folder} is quantised ({name}: {str(method)[:40]!r} in its config.json), which cannot run "
                "here; give the model as it was before, and --quantise nf4 to have it in 4 bits"
            )
    if (folder / "adapter_config.json").exists():
        raise BackboneError(
            f"backbone: {folder} holds adapter_config.json: give the model alone, and its adapter to "
            "`polygraft grafts import`"
        )
    try:
        ModelShape.from_config(config)
    except SpecError as error:
        raise BackboneError(f"backbone: {folder}: {error}") from None


def _headers(folder: Path) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor in the files that transformers reads."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in _shards(folder):
        try:
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if name in found:
                        raise BackboneError(f"backbone: {folder}: {name} lies in two files, {path.name} and another")
                    part = file.get_slice(name)
                    found[name] = part.get_dtype(), tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise BackboneError(f"backbone: {path} is not a whole safetensors file: {str(error)[:200]}") from None
    return found


def _shards(folder: Path) -> Iterable[Path]:
    """model.safetensors, or the files that its index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        why = f"only {pickled[0]}, which can run code when loaded; convert it to" if pickled else "no"
        raise BackboneError(f"backbone: {folder} holds {why} safetensors (model.safetensors, or its index and parts)")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BackboneError(f"backbone: {index} cannot be read: {type(error).__name__}: {str(error)[:200]}") from None
    lost = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if lost:
        raise BackboneError(f"backbone: {folder} has no {_names(lost)}, which {index.name} names; complete its files")
    return [folder / name for name in names]


def _compared(
    shape: ModelShape, config: Mapping[str, object], tensors: Mapping[str, tuple[str, tuple[int, ...]]], folder: Path
) -> Mapping[str, object]:
    """What transformers would find missing, unexpected and misshapen: it loads one number for each tensor, spread."""
    import torch
    import transformers

    state = {name: torch.zeros(()).expand(size) for name, (_, size) in tensors.items()}
    try:
        with _quiet():
            read = transformers.AutoConfig.from_pretrained(folder)
            with torch.device("meta"):
                found = type(model_class(shape, config).from_config(read))  # type: ignore[no-untyped-call]
            _, info = found.from_pretrained(
                None,
                config=read,
                state_dict=state,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # a config can be wrong in as many ways as there are fields
        raise BackboneError(f"backbone: {folder}: transformers cannot make its model: {str(error)[:300]}") from error
    return dict(info)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report on the weights, which ours replaces, and its bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _read(names: object, table: Architecture) -> list[str]:
    """Those that a forward of ours would read."""
    assert isinstance(names, (set, frozenset, list, tuple))
    parts = {f".{module}." for module in table.unread}
    return sorted(str(name) for name in names if not any(part in f".{name}." for part in parts))


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
