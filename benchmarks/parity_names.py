"""Where the probe finds what it calls, in a tree of any age: today's name first, then those that went before it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tests_folder import tests_of as tests_of
from torch import Tensor


def named(*choices: str) -> Any:
    """The first of `module:name` (under polygraft, or tests) that the tree has."""
    errors = []
    for choice in choices:
        module, _, name = choice.partition(":")
        try:
            found = import_module(module if module.startswith("tests.") else f"polygraft.{module}")
            return getattr(found, name) if name else found
        except (ImportError, AttributeError) as error:
            errors.append(f"{choice}: {error}")
    raise LookupError("; ".join(errors))


def attribute(value: object, *names: str) -> Any:
    """The first of these attributes that the value has."""
    for name in names:
        if hasattr(value, name):
            return getattr(value, name)
    raise LookupError(f"{type(value).__name__} has none of {', '.join(names)}")


def keyword(function: Callable[..., object], *names: str) -> str:
    """The first of these that is a parameter of the function."""
    taken = inspect.signature(function).parameters
    return next(name for name in names if name in taken)


parse = named("grafts.grammar:parse")
initialise = named("grafts.init:initialise")
Backbone = named("grafts.runtime.backbone:Backbone")
Resident = named("grafts.runtime.stacks:Resident")
Source = named("grafts.sources:Source")
SpecError = named("grafts.spec:SpecError")
FormatError = named("grafts.formats.check:FormatError")
BackboneFiles = named("grafts.formats.backbone_files:BackboneFiles", "grafts.formats.stock:Stock")
TrainConfig = named("trainers.job:TrainConfig", "trainers.job:Recipe")
TrainJob = named("trainers.job:TrainJob")
Sample = named("trainers.job:Sample")
PackRunner = named("trainers.runner:PackRunner")
Engine = named("serving.engine:Engine")
GenerationRequest = named("serving.sequence:GenerationRequest")
ServeSettings = named("cluster.settings:ServeSettings")


def shaped(function: Callable[..., object], backbone: Any) -> Mapping[str, object]:
    """The backbone's shape for what takes it beside a graft; in later trees a graft is bound to it."""
    return {"shape": backbone.shape} if "shape" in inspect.signature(function).parameters else {}


def graft_of(text: str, backbone: Any) -> Any:
    """What a job, a resident and a folder take for a graft that is written as `text`."""
    try:
        bound = named("grafts.bound:BoundGraft")
    except LookupError:
        return parse(text)
    return bound(parse(text), backbone.shape)


def job_of(name: str, text: str, backbone: Any, samples: Sequence[Any], **recipe: Any) -> Any:
    return TrainJob(name, graft_of(text, backbone), TrainConfig(**recipe), tuple(samples))


def start_of(text: str, backbone: Any, seed: int, samples: Sequence[Any], sources: Mapping[str, Any]) -> Any:
    """A graft's starting values by name."""
    ids, weights = [sample.ids for sample in samples], [sample.weights for sample in samples]
    graft = graft_of(text, backbone)
    return initialise(graft, backbone, seed=seed, samples=ids, weights=weights, sources=sources)


def trained_names(text: str, backbone: Any) -> set[str]:
    """The tensors of a graft that training changes."""
    graft = graft_of(text, backbone)
    tensors = graft.tensors if hasattr(graft, "tensors") else named("grafts.sizes:tensors")(graft, backbone.shape)
    return {tensor.name for tensor in tensors if tensor.trained}


def source_names(text: str, backbone: Any) -> Sequence[str]:
    return tuple(parse(text).sources)


def resident_of(name: str, text: str, backbone: Any, values: Mapping[str, Tensor]) -> Any:
    return Resident(name, graft_of(text, backbone), values)


def saved(root: Path, text: str, backbone: Any, values: Mapping[str, Tensor]) -> str:
    """Write a native folder under `root`, PEFT's files beside it; its name."""
    save = named("grafts.formats.native:save")
    files = {keyword(save, "stock", "backbone_files", "files"): BackboneFiles(backbone.folder)}
    graft, shape = graft_of(text, backbone), shaped(save, backbone)
    return str(save(root, graft, values, backbone=backbone.fingerprint, **shape, **files))
