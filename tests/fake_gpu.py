"""A machine with a GPU where there is none.

What lies on the CPU is real. What lies on the device has a shape, a type and a device, and no values
(`torch._subclasses.FakeTensorMode`): an operation on tensors of both raises as it would there, where it is allowed
neither with one of no dimensions; so does what cannot go on without a value of the device (`item`, `nonzero`, a mask as
an index). A copy to the CPU gives ones and is counted, since the host waits for it. Triton programs are not run, but
every tensor that one is given must lie on the device. Shapes, types and devices are tested, then, and no numbers.

Inside `watch` it is noted what the device is asked to do, and from which of our lines the host reads from it and sends
to it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from triton.runtime.jit import JITFunction

from polygraft.grafts.methods.reparameterised import fourier
from polygraft.kernels.nf4 import gpu as nf4_gpu
from polygraft.kernels.rotate import gpu as rotate_gpu

DEVICE, _META = torch.device("cuda", 0), torch.device("meta")
_KEPT = (fourier._entries, nf4_gpu._levels, rotate_gpu._channels)  # tensors that processes keep
_ROOT = Path(__file__).resolve().parents[1]
_OURS = tuple(f"{_ROOT / folder}/" for folder in ("grafts", "kernels", "serving", "trainers"))
_NO_WORK = ("empty", "empty_like", "new_empty", "detach", "lift_fresh", "_unsafe_view")


class Event(NamedTuple):
    """A launch of a program or an operation of the library with its arguments' shapes, or a copy: "send" to the device,
    "read" from it."""

    kind: Literal["launch", "send", "read"]
    name: str = ""
    shapes: tuple[object, ...] = ()


@dataclass
class Watched:
    """What was asked of the device: our programs by name, the library's operations that work there by name (views and
    allocations do not), and copies in both directions by the line of ours that made them. `host` are operations on
    tensors of the CPU alone; `events` are all that reached the device, in order."""

    programs: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    sends: Counter[str] = field(default_factory=Counter)
    host: Counter[str] = field(default_factory=Counter)
    events: list[Event] = field(default_factory=list)

    @property
    def launches(self) -> int:
        """At least so many: an operation of the library may be several."""
        return self.programs.total() + self.operations.total() + self.reads.total() + self.sends.total()


class FakeGpu(TorchDispatchMode):
    """Operations of the CPU alone are done; `reads` are the copies from the device to it, `launches` the programs."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.launches, self.loading = 0, 0, False
        self.watched: Watched | None = None

    @contextmanager
    def watch(self) -> Iterator[Watched]:
        """Note what the device is asked for inside."""
        self.watched = watched = Watched()
        try:
            yield watched
        finally:
            self.watched = None

    def __torch_dispatch__(
        self,
        func: OpOverload[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is torch.ops.prim.device.default:
            return _META
        given = dict(kwargs or {})
        if given.get("device") == _META and not self.loading:
            given["device"] = DEVICE
        leaves = tree_leaves((args, given))
        if not any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in leaves):
            if self.watched is not None:
                self.watched.host[_name(func)] += 1
            with unset_fake_temporarily():
                return func(*args, **given)
        if torch.is_inference_mode_enabled() and func._can_decompose():
            with self:
                return func.decompose(*args, **given)
        if func is torch.ops.aten.copy_.default and not isinstance(args[0], FakeTensor):
            raise RuntimeError("a copy into a tensor on the CPU would be lost here; use .cpu()")
        found = func(*args, **given)
        copied = found if func is torch.ops.aten._to_copy.default and isinstance(found, Tensor) else None
        read = copied if copied is not None and copied.device.type == "cpu" else None
        if self.watched is not None:
            self._note(self.watched, func, leaves, read=read is not None)
        if read is not None:
            self.reads += 1
            with unset_fake_temporarily():
                return torch.ones(read.shape, dtype=read.dtype)
        return found

    def _note(self, watched: Watched, func: Callable[..., object], leaves: Sequence[object], *, read: bool) -> None:
        sent = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, FakeTensor) and x.dim()]
        if read:
            watched.reads[_line()] += 1
            watched.events.append(Event("read"))
        elif sent:
            watched.sends[_line()] += len(sent)
            watched.events.append(Event("send"))
        name = _name(func)
        copied = name == "_to_copy" and (read or sent)
        if not (copied or name in _NO_WORK or getattr(func, "is_view", False)):
            watched.operations[name] += 1
            watched.events.append(Event("launch", name, _shapes(leaves)))


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Inside, `Backbone.load(..., device=DEVICE)` and what is done with it."""
    machine = FakeGpu()

    def launch(program: JITFunction[object], *args: object, grid: object, warmup: bool, **constants: object) -> None:
        machine.launches += 1
        if machine.watched is not None:
            machine.watched.programs[program.__name__] += 1
            machine.watched.events.append(Event("launch", program.__name__, (grid, *_shapes(args))))
        for x in args:
            assert not isinstance(x, Tensor) or x.device == DEVICE, f"a program was given a tensor on {x.device}"

    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def loaded(cls: type[PreTrainedModel], /, *args: object, **options: object) -> PreTrainedModel:
        machine.loading = True
        try:
            return load(cls, *args, **options)
        finally:
            machine.loading = False

    dispatch = FakeTensor.__torch_dispatch__.__func__  # type: ignore[attr-defined]

    def dispatched(cls: type[FakeTensor], func: object, *rest: object) -> object:
        return _META if func is torch.ops.prim.device.default else dispatch(cls, func, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", launch)
        for name in ("_exchange_device", "_maybe_exchange_device"):
            patch.setattr(torch.cuda, name, lambda device: -1)
        patch.setattr(FakeTensor, "data_ptr", _place, raising=False)
        patch.setattr(FakeTensor, "is_cuda", property(lambda x: x.fake_device.type == "cuda"), raising=False)
        patch.setattr(FakeTensor, "is_cpu", property(lambda x: x.fake_device.type == "cpu"), raising=False)
        patch.setattr(FakeTensor, "get_device", lambda x: x.fake_device.index, raising=False)
        patch.setattr(FakeTensor, "_normalize_fake_device", staticmethod(lambda x: x if x.type == "cpu" else DEVICE))
        patch.setattr(FakeTensor, "__torch_dispatch__", classmethod(dispatched))
        patch.setitem(fake_tensor._DISPATCH_META_HANDLERS, torch.ops.prim.device.default, lambda _: _META)
        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(loaded))
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), machine:
                yield machine
        finally:
            for kept in _KEPT:
                kept.cache_clear()


def _shapes(values: Sequence[object]) -> tuple[object, ...]:
    return tuple(tuple(x.shape) for x in values if isinstance(x, Tensor))


def _name(func: Callable[..., object]) -> str:
    """An operation's, without its namespace and overload."""
    return str(func).split(".")[1] if str(func).count(".") else str(func)


def _line() -> str:
    """The innermost line of ours on the stack, as `folder/file.py:line`."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename.replace("/.types/polygraft/", "/")
        if file.startswith(_OURS):
            return f"{Path(file).relative_to(_ROOT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def _place(x: Tensor) -> int:
    """A number that tensors share where they share their memory's beginning."""
    return x.untyped_storage()._cdata + x.storage_offset() * x.element_size()
