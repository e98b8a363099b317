"""dW with few coefficients in another basis, at entries that a seed chooses (and no file has to keep)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.methods.ranges import Count, Piece, Projections
from polygraft.grafts.methods.reparameterised.kronecker import divided
from polygraft.grafts.spec import DeclRef, Delta, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, TensorDecl]
Values = Mapping[str, "Tensor"]


def fourierft(
    n: Count = 1000, scale: float = 150.0, at: Projections = "attn.[qv]", seed: int = 777
) -> tuple[Slot, ...]:
    """dW = s Re(F^-1(E)), the inverse Fourier transform of a matrix with n trained entries (Gao et al. 2024, arXiv
    2405.03003, eq. 2 to 4).

    A `seed` chooses the entries, so that no file has to keep them.

    Deviations: None known; the entries are the ones that PEFT draws from the seed.

    Choose when: a few hundred numbers a site must do. A dense dW is made in every step; it needs a high rate.
    """
    return (Delta(at=at, form=DeclRef("fourierft", (("n", n), ("scale", scale), ("seed", seed)))),)


def waveft(n: Count = 2592, scale: float = 25.0, at: Projections = "attn.[qv]", seed: int = 777) -> tuple[Slot, ...]:
    """dW with n trained coefficients of its Haar wavelets, at entries that a seed chooses (Bilican et al. 2025, arXiv
    2505.12532, section 3).

    Deviations: Of the wavelets Haar's (db1) alone.

    Choose when: `fourierft` is too global: a coefficient here changes a square of W.
    """
    return (Delta(at=at, form=DeclRef("waveft", (("n", n), ("scale", scale), ("seed", seed)))),)


def c3a(block: Piece = 256, at: Projections = "linear") -> tuple[Slot, ...]:
    """dW of blocks of b x b that are circulant, each made of b numbers: a convolution of blocks of x (Chen et al. 2024,
    arXiv 2407.19342, eq. 3 and 4).

    Deviations: dW is divided by the width of the input, as in PEFT, which the paper's is not; it is made dense, where
    the paper multiplies by FFT.

    Choose when: full rank is wanted from few numbers: in x out / b of them.
    """
    return (Delta(at=at, form=DeclRef("c3a", (("block", block),))),)


def _spectrum(slot: Delta, place: SiteShape, n: int, scale: float, seed: int) -> Parts:
    if not 1 <= n <= place.d_in * place.d_out:
        raise SpecError(f"n: {n} coefficients at {place.name}; give 1 to {place.d_in * place.d_out}")
    return {"c": TensorDecl((n,))}


def _fourierft(
    slot: Delta, values: Values, lowering: Lowering, n: int, scale: float, seed: int
) -> Mapping[str, Tensor]:
    from torch import fft

    return {"W": scale * fft.ifft2(_placed(values["c"], lowering.place, seed)).real}


def _waveft(slot: Delta, values: Values, lowering: Lowering, n: int, scale: float, seed: int) -> Mapping[str, Tensor]:
    """Haar: an average a and the details h, v, d of a 2 x 2 square give its corners (a +- h +- v +- d) / 2."""
    from torch import stack

    if lowering.place.d_in % 2 or lowering.place.d_out % 2:
        raise SpecError(f"at: {lowering.place.name} has an odd width, which the Haar transform cannot halve")
    upper, lower = _placed(values["c"], lowering.place, seed).chunk(2)
    (a, h), (v, d) = upper.chunk(2, 1), lower.chunk(2, 1)
    # h differs down the rows and v along the columns, as in PEFT.
    top = stack((a + h + v + d, a + h - v - d), 2).flatten(1)
    bottom = stack((a - h + v - d, a - h - v + d), 2).flatten(1)
    return {"W": scale / 2 * stack((top, bottom), 1).flatten(0, 1)}


def _c3a_own(slot: Delta, place: SiteShape, block: int) -> Parts:
    d_in, d_out = divided(place, block)
    return {"c": TensorDecl((d_out, d_in, block))}


def _c3a(slot: Delta, values: Values, lowering: Lowering, block: int) -> Mapping[str, Tensor]:
    """Row i, column j of a block is c[(j - i) mod b], over the width of the input."""
    import torch

    c = values["c"]
    place = torch.arange(block, device=c.device)
    blocks = c[:, :, (place - place.unsqueeze(1)) % block]  # [out / b, in / b, b, b]
    return {"W": blocks.transpose(1, 2).reshape(lowering.place.d_out, -1) / lowering.place.d_in}


def _placed(c: Tensor, place: SiteShape, seed: int) -> Tensor:
    """[out, in] of zeros with the coefficients at their entries."""
    entries = _entries(place.d_out * place.d_in, len(c), seed).to(c.device)
    flat = c.new_zeros(place.d_out * place.d_in)
    return flat.index_copy(0, entries, c).view(place.d_out, place.d_in)


@lru_cache(maxsize=64)
def _entries(total: int, n: int, seed: int) -> Tensor:
    """n of `total` entries without repetition, the ones that PEFT draws from the seed."""
    import torch

    with torch.inference_mode(False):  # kept for steps of training, though an evaluation may ask first
        return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n].clone()


METHODS = (
    Method("fourierft", "arXiv 2405.03003", 1e-2, fourierft),
    Method("waveft", "arXiv 2505.12532", 1e-3, waveft),
    Method("c3a", "arXiv 2407.19342", 1e-1, c3a),
)
PARAMETRIZATIONS = (
    Parametrization("fourierft", _fourierft, _spectrum),
    Parametrization("waveft", _waveft, _spectrum),
    Parametrization("c3a", _c3a, _c3a_own),
)
PEFT = (
    Peft(
        kind="FOURIERFT",
        method="fourierft",
        conv1d=True,
        names={"n": ("n_frequency", 1000), "scale": ("scaling", 150.0), "seed": ("random_loc_seed", 777)},
        idle={"init_weights": None},
        patterns={"n_frequency_pattern": "n_frequency"},
        own={"c": Kept("fourierft_spectrum")},
    ),
    Peft(
        kind="WAVEFT",
        method="waveft",
        conv1d=True,
        names={"n": ("n_frequency", 2592), "scale": ("scaling", 25.0), "seed": ("random_loc_seed", 777)},
        needs={"wavelet_family": "db1", "use_idwt": True},
        idle={"init_weights": True},
        patterns={"n_frequency_pattern": "n_frequency"},
        own={"c": Kept("waveft_spectrum")},
    ),
    Peft(
        kind="C3A",
        method="c3a",
        names={"block": ("block_size", 256)},
        idle={"init_weights": "xavier_uniform"},
        patterns={"block_size_pattern": "block_size"},
        own={"c": Kept("c3a_kernel")},
    ),
)
