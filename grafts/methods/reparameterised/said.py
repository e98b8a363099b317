"""SAID: all of dW from one vector by a random projection.

P is Fastfood (Le et al. 2013), stacked blocks H G Pi H B / |.| over d rounded up to a power of two: H Walsh and
Hadamard's matrix, B signs, Pi a permutation, G normal, every row of length 1. A seed and the site's name give B, Pi and
G, so that no file has to keep them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from zlib import crc32

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.ranges import Count, Projections
from polygraft.grafts.spec import DeclRef, Delta, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor


def said(d: Count = 1000, at: Projections = "linear", seed: int = 0) -> tuple[Slot, ...]:
    """Intrinsic dimension, structure-aware: all of the sites' dW are one random projection of one trained vector z [d],
    each with a factor of its own, vec(dW) = l P z (Aghajanyan et al. 2021, arXiv 2012.13255, eq. 2 and
    3).

    Deviations: P is a Fastfood transform for each site by itself, from a seed and the site's name; the paper has one
    over all parameters and a factor for each layer, whose number it takes out of d, where ours come on top. Rows of P
    are normalised here, which eq. 2 does not say.

    Choose when: you want to know how few numbers a task needs. A dense dW is made at each site in every step.
    """
    if d < 1:
        raise SpecError(f"peft: said.d: {d} is not a size; give at least 1")
    return (Delta(at=at, form=DeclRef("said", (("d", d), ("seed", seed)))),)


def _own(slot: Delta, place: SiteShape, d: int, seed: int) -> Mapping[str, TensorDecl]:
    return {"l": TensorDecl((1,), "one")}


def _shared(slot: Delta, places: Sequence[SiteShape], d: int, seed: int) -> Mapping[str, TensorDecl]:
    return {"z": TensorDecl((d,))}


def _operands(slot: Delta, values: Mapping[str, Tensor], lowering: Lowering, d: int, seed: int) -> Mapping[str, Tensor]:
    import torch
    from torch.nn import functional as F

    place, z = lowering.place, values["z"]
    size, width = place.d_out * place.d_in, 1 << (d - 1).bit_length()
    blocks = -(-size // width)
    generator = torch.Generator().manual_seed(crc32(f"{seed}/{place.layer}.{place.name}".encode()))
    B = torch.randint(0, 2, (blocks, width), generator=generator).to(z) * 2 - 1
    order = torch.rand(blocks, width, generator=generator).argsort(1).to(z.device)
    G = torch.randn(blocks, width, generator=generator).to(z)
    mixed = hadamard(B * F.pad(z, (0, width - d))).gather(1, order)
    rows = hadamard(G * mixed) / (width * G.square().sum(1, keepdim=True)).sqrt()
    return {"W": values["l"] * rows.flatten()[:size].view(place.d_out, place.d_in)}


def hadamard(x: Tensor) -> Tensor:
    """H x of the rows of x, whose width is a power of two, in log2(width) passes."""
    import torch

    width, half = x.shape[1], 1
    while half < width:
        a, b = x.view(len(x), -1, 2, half).unbind(2)
        x = torch.stack((a + b, a - b), 2).view(len(x), width)
        half *= 2
    return x


METHODS = (Method("said", "arXiv 2012.13255", 1e-2, said),)
PARAMETRIZATIONS = (Parametrization("said", _operands, _own, _shared),)
