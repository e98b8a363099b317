"""What the modules of one forward leave for each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from polygraft.grafts.sites import Site


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Entries by site; whoever needs one takes it out. It lies beside the `RouteTable` and dies with the forward.

    `products` are those of fused projections that a member has not asked for yet, by member, under the group's first
    site. `inputs` is what entered a site, for what ends it. `norms` says how to make the output of a norm again.
    """

    products: dict[Site, dict[int, Tensor]] = field(default_factory=dict)
    inputs: dict[Site, Tensor] = field(default_factory=dict)
    norms: dict[Site, Callable[[], Tensor]] = field(default_factory=dict)
