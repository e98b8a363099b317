"""Site plans: what happens at a site, compiled once for a set of stacks from the one order of ops (`keys.Phase`).

A plan is a tuple of steps and belongs to its stacks; a site's module is a loop over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from polygraft.grafts.runtime.fused import FusedBranches, Unfused, fused_branches
from polygraft.grafts.runtime.keys import BranchKey, KVKey, Phase
from polygraft.grafts.runtime.linears.protocol import FrozenLinear
from polygraft.grafts.runtime.route import RouteTable
from polygraft.grafts.runtime.stack import Stack
from polygraft.grafts.runtime.stacks import Stacks
from polygraft.grafts.runtime.steps import (
    AddBias,
    KeepInput,
    OnOutput,
    OwnProduct,
    Passing,
    Product,
    SharedProduct,
    Step,
    step_of,
)
from polygraft.grafts.sites import KV_SITE, Site

Plan = tuple[Step, ...]
_ON_INPUT = (Phase.ROTATE_INPUT, Phase.AFFINE_INPUT)
_AFTER = tuple(phase for phase in Phase if phase > Phase.OWN)


def run(plan: Plan, x: Tensor, own: Tensor, route: RouteTable) -> Tensor:
    """What leaves the site, [T, out], of what entered it and what its own function made of that (x, where the plan
    holds that function)."""
    rows = Passing(x, own, own)
    for step in plan:
        step(rows, route)
    return rows.y


def output_plan(site: Site, stacks: Stacks) -> Plan:
    """After the site's own function: of a norm, a sublayer, a layer."""
    return stacks.derived((output_plan, site), lambda: _after(site, stacks))


def linear_plan(group: Sequence[Site], member: int, linear: FrozenLinear, route: RouteTable) -> Plan:
    """Of the projection `member` of a fused linear, whose projections stand at `group`."""
    stacks, dropping = route.stacks, route.dropout_keys is not None
    return stacks.derived(
        (linear_plan, group[member], dropping), lambda: _linear(group, member, linear, stacks, dropping=dropping)
    )


def branches_of(
    group: Sequence[Site], stacks: Stacks, *, dropping: bool = False
) -> tuple[FusedBranches, list[Unfused]]:
    """The branches of a fused linear whose projections stand at `group`, and of each those that are not fused."""
    return stacks.derived(
        (fused_branches, group[0], dropping),
        lambda: fused_branches([stacks.get(one) for one in group], dropping=dropping),
    )


def _linear(group: Sequence[Site], member: int, linear: FrozenLinear, stacks: Stacks, *, dropping: bool) -> Plan:
    site = group[member]
    fused, unfused = branches_of(group, stacks, dropping=dropping)
    here = stacks.get(site)
    changing = [(key, stack) for phase in _ON_INPUT for key, stack in here.items() if key.phase is phase]
    on_input = [step_of(key, stack, site, stacks) for key, stack in changing]
    steps: list[Step] = []
    if site.name == "attn.q" and any(key.gate != "none" for key, _ in stacks.of_kind(Site(site.layer, KV_SITE), KVKey)):
        steps.append(KeepInput(Site(site.layer, KV_SITE)))
    if len(group) == 1:
        steps += [*on_input, Product(linear, fused)]
    else:
        # Before the changes, so that a backward sums the gradient of x in one order with them and without.
        steps += [SharedProduct(group[0], member, linear, fused), *on_input]
        if changing:
            steps.append(OwnProduct(member, linear, tuple(stack.slices for _, stack in changing)))

    def left(key: object, stack: Stack) -> Stack | None:
        """The part of a stack that is not fused."""
        if isinstance(key, BranchKey):
            slices = unfused[member][key]
            return Stack(key, slices, stack.parts) if slices else None
        return stack

    return (*steps, *_after(site, stacks, left, linear.biases()[member]))


def _after(
    site: Site,
    stacks: Stacks,
    left: Callable[[object, Stack], Stack | None] = lambda key, stack: stack,
    bias: Tensor | None = None,
) -> Plan:
    steps: list[Step] = []
    for phase in _AFTER:
        if phase is Phase.BIAS and bias is not None:
            steps.append(OnOutput(AddBias(bias)))
        for key, stack in stacks.get(site).items():
            own = left(key, stack) if key.phase is phase else None
            if own is not None:
                steps.append(step_of(key, own, site, stacks))
    return tuple(steps)
