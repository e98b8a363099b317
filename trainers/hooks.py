"""What a job's method does to its own tensors around an optimiser step, as `grafts/methods` declares it."""

from __future__ import annotations

from math import prod

import torch

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.methods.registry import hook
from polygraft.grafts.runtime.slab import Slab


class Hooks:
    """The hooks of one job over its slab, in the order of its spec. They see this job's tensors and no other's.

    `eps` is the distance of a job that is trained by forward passes alone, None for one with a backward; of one that is
    `resized` each step computes with a subnet.
    """

    def __init__(self, graft: BoundGraft, slab: Slab) -> None:
        self._slab = slab
        self._hooks = tuple((hook(call.name), call.keywords()) for call in graft.spec.hooks)
        self.eps = next((float(arguments["eps"]) for one, arguments in self._hooks if one.forward_only), None)
        self.resized = any(one.resized for one, _ in self._hooks)
        rated = [(one.rate, arguments) for one, arguments in self._hooks if one.rate is not None]
        self.rates = tuple(prod(rate(t, **arguments) for rate, arguments in rated) for t in slab.trained if rated)

    def phase(self, step: int, total: int) -> range:
        """The steps, of `total`, around `step` that one optimiser takes, with moments and a schedule of its own."""
        anew = [one.anew(total, **arguments) for one, arguments in self._hooks if one.anew is not None]
        return range(max((s for s in anew if s <= step), default=0), min((s for s in anew if s > step), default=total))

    def before_step(self) -> None:
        """Add the penalties' gradients to the collected one, then let methods change it."""
        for declared, arguments in self._hooks:
            if declared.penalty is not None:
                leaves = {name: view.detach().requires_grad_() for name, view in self._slab.views.items()}
                with torch.enable_grad():
                    value = declared.penalty({**self._slab.frozen, **leaves}, **arguments)
                found = torch.autograd.grad(value, [*leaves.values()], allow_unused=True)
                for into, gradient in zip(self._slab.gradients().values(), found, strict=True):
                    if gradient is not None:
                        into.add_(gradient)
            if declared.gradient is not None:
                with torch.no_grad():
                    declared.gradient(self._slab.tensors, self._slab.gradients(), **arguments)

    def after_step(self, step: int, total: int) -> None:
        """Let methods change their tensors after optimiser step `step` (from 0) of `total`."""
        with torch.no_grad():
            for declared, arguments in self._hooks:
                if declared.after_step is not None:
                    declared.after_step(self._slab.tensors, self._slab.gradients(), step, total, **arguments)
