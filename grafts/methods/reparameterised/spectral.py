"""LoRA that starts from a factorisation of W. W itself never changes, since others share it: what a paper takes out of
W is a frozen second branch -s B0 A0 beside the trained s B A, so that y = W x + s (B A - B0 A0) x is W x at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Method, Start
from polygraft.grafts.methods.exchange import Packed, Peft
from polygraft.grafts.methods.ranges import Alpha, Dropout, Projections, Rank
from polygraft.grafts.methods.reparameterised.lora import LORA_PATTERNS
from polygraft.grafts.sites import meets_no_projection, sublayers
from polygraft.grafts.spec import Branch, DeclRef, GraftSpec, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.formats.backbone_files import BackboneFiles
    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec

Values = Mapping[str, "Tensor"]


def pissa(r: Rank = 8, alpha: Alpha = 8.0, at: Projections = "linear") -> tuple[Slot, ...]:
    """LoRA that starts as the r largest singular triplets of W, so that the principal part of W is what learns (Meng et
    al. 2024, arXiv 2404.02948, eq. 2 to 4).

    Deviations: W is shared and does not change: what the paper takes out of it is a frozen branch -s B0 A0 beside the
    trained one, y = W x + s (B A - B0 A0) x, the same function with twice the ranks' products.

    Choose when: LoRA converges too slowly; an SVD of each W is made at the start.
    """
    return shifted(r, alpha / max(r, 1), at, DeclRef("singular", (("end", "major"),)))


def milora(r: Rank = 8, alpha: Alpha = 8.0, at: Projections = "linear") -> tuple[Slot, ...]:
    """LoRA that starts as the r smallest singular triplets of W, so that what W knows most firmly is left alone (Wang
    et al. 2024, arXiv 2406.09044, eq. 3 to 5).

    Deviations: As in `pissa` what is taken out of W is a frozen branch beside the trained one.

    Choose when: old abilities must be kept while new ones are learned.
    """
    return shifted(r, alpha / max(r, 1), at, DeclRef("singular", (("end", "minor"),)))


def olora(r: Rank = 8, alpha: Alpha = 8.0, at: Projections = "linear") -> tuple[Slot, ...]:
    """LoRA that starts as the first r columns of Q and rows of R of W = Q R (Buyukakyuz 2024, arXiv 2406.01775, section
    3).

    Deviations: As in `pissa` what is taken out of W is a frozen branch beside the trained one.

    Choose when: an orthonormal start is wanted at a QR's price and not an SVD's.
    """
    return shifted(r, alpha / max(r, 1), at, DeclRef("qr"))


def mica(r: Rank = 8, alpha: Alpha = 16.0, at: Projections = "linear", dropout: Dropout = 0.0) -> tuple[Slot, ...]:
    """LoRA whose B is the r minor left singular vectors of W, frozen, and whose A starts at 0 and is trained alone
    (arXiv 2604.01694, as PEFT has it).

    Deviations: Held against PEFT's init_lora_weights="mica".

    Choose when: forgetting must be small: changes go into outputs that W hardly uses. Half of LoRA's numbers.
    """
    form = DeclRef("part-frozen", (("part", "B"), ("A", "zero"), ("B", "minor")))
    return (Branch(at=on_projections(at), rank=r, scale=alpha / max(r, 1), dropout=dropout, form=form),)


def orthogonal(
    r: Rank = 8, alpha: Alpha = 16.0, at: Projections = "linear", dropout: Dropout = 0.0
) -> tuple[Slot, ...]:
    """LoRA whose A and B start random in complementary subspaces of the ranks, so that B A = 0 with neither 0 (as
    PEFT's init_lora_weights="orthogonal").

    `r` is even: half of the ranks are A's and half B's.

    Deviations: It has no paper; held against PEFT.

    Choose when: LoRA's first steps, in which A has no gradient, are to be avoided without touching W.
    """
    if r % 2:
        raise SpecError(f"peft: orthogonal.r: {r} is odd; half of the ranks are A's and half B's, give an even number")
    return (Branch(at=at, rank=r, scale=alpha / max(r, 1), dropout=dropout, start=DeclRef("orthogonal")),)


def shifted(r: int, scale: float, at: str, start: DeclRef) -> tuple[Slot, ...]:
    """A trained branch, and the frozen one that takes its starting value away."""
    return (
        Branch(at=on_projections(at), rank=r, scale=scale, start=start),
        Branch(at=at, rank=r, scale=-scale, start=start, frozen=True),
    )


def on_projections(at: str) -> str:
    """`at`, when it names no sublayer or block, which have no W to start from."""
    if sublayers(at) or meets_no_projection(at):
        raise SpecError(f"at: {at!r} names more than projections; others have no weight matrix to start from")
    return at


def _singular(tensor: TensorSpec, making: Making, end: str) -> Tensor:
    """A0 = sqrt(S / s) V^T, B0 = U sqrt(S / s) over the r triplets at one end of the spectrum."""
    rank, scale = tensor.shape[0], strength(tensor, making)

    def make() -> tuple[Tensor, Tensor]:
        return _factors(weight_of(tensor, making), rank, scale, end)

    return making.once(("singular", end, tensor.site, rank, scale), make)["AB".index(tensor.part)]


def _factors(W: Tensor, rank: int, scale: float, end: str = "major") -> tuple[Tensor, Tensor]:
    from torch import linalg

    U, S, Vh = linalg.svd(W, full_matrices=False)
    chosen = slice(rank) if end == "major" else slice(len(S) - rank, None)
    root = (S[chosen] / scale).sqrt().unsqueeze(1)
    return root * Vh[chosen], root * U.T[chosen]


def _rows(W: Tensor, rank: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The first rows of R and columns of Q, W = Q R, whatever the scale."""
    from torch import linalg

    Q, R = linalg.qr(W)
    return R[:rank].clone(), Q.T[:rank].clone()


def _qr(tensor: TensorSpec, making: Making) -> Tensor:
    rank = tensor.shape[0]

    def make() -> tuple[Tensor, Tensor]:
        return _rows(weight_of(tensor, making), rank)

    return making.once(("qr", tensor.site, rank), make)["AB".index(tensor.part)]


def _minor(tensor: TensorSpec, making: Making) -> Tensor:
    from torch import linalg

    U: Tensor = linalg.svd(weight_of(tensor, making), full_matrices=False)[0]
    return U.T[-tensor.shape[0] :].clone()


def _orthogonal(tensor: TensorSpec, making: Making) -> Tensor:
    """A from the even rows of one random rotation of the ranks, B from the odd ones: B^T A sums to nothing."""
    from torch import linalg, randn

    rank = tensor.shape[0]

    def make() -> Tensor:
        square = randn(rank, rank, generator=making.generator(f"{tensor.slot}.{tensor.site}.ranks"))
        rotated: Tensor = linalg.qr(square)[0]
        return rotated

    rows = making.once(("ranks", tensor.slot, tensor.site), make)["AB".index(tensor.part) :: 2]
    return rows.T @ randn(rank // 2, tensor.shape[1], generator=making.generator(tensor.name)) / 10


def weight_of(tensor: TensorSpec, making: Making) -> Tensor:
    """W at the tensor's site, when it has as many ranks as the tensor."""
    assert tensor.site is not None
    weight = making.weight(tensor.site)
    if tensor.shape[0] > min(weight.shape):
        raise SpecError(f"r: {tensor.shape[0]} is more than the {min(weight.shape)} ranks of W at {tensor.site}")
    return weight


def strength(tensor: TensorSpec, making: Making) -> float:
    """The scale of a slot and of its frozen twin alike."""
    slot = making.spec.slots[tensor.slot]
    assert isinstance(slot, Branch)
    return abs(slot.scale)


METHODS = (
    Method("pissa", "arXiv 2404.02948", 1e-4, pissa),
    Method("milora", "arXiv 2406.09044", 3e-4, milora),
    Method("olora", "arXiv 2406.01775", 1e-4, olora),
    Method("mica", "arXiv 2604.01694", 3e-4, mica),
    Method("orthogonal", "PEFT init_lora_weights=orthogonal", 3e-4, orthogonal),
)
STARTS = (Start("singular", _singular), Start("qr", _qr), Start("minor", _minor), Start("orthogonal", _orthogonal))


def _pack(
    values: Values,
    layout: Sequence[TensorSpec],
    module: Callable[..., str],
    backbone_files: BackboneFiles,
    spec: GraftSpec,
) -> Values:
    """PEFT's file holds the trained A and B alone: it takes their start out of W again when it loads them."""
    return {
        f"{module(tensor.site)}.lora_{tensor.part}.weight": _turned(tensor, values[tensor.name])
        for tensor in layout
        if tensor.trained
    }


def _unpack(
    stored: Values,
    layout: Sequence[TensorSpec],
    module: Callable[..., str],
    backbone_files: BackboneFiles,
    spec: GraftSpec,
) -> Values:
    found: dict[str, Tensor] = {}
    taken: dict[object, tuple[Tensor, Tensor]] = {}
    for tensor in layout:
        slot = spec.slots[tensor.slot]
        assert tensor.site is not None and isinstance(slot, Branch) and slot.start is not None
        if tensor.trained:
            found[tensor.name] = _turned(tensor, stored[f"{module(tensor.site)}.lora_{tensor.part}.weight"])
            continue
        if tensor.site not in taken:
            factors = _factors if slot.start.name == "singular" else _rows
            taken[tensor.site] = factors(backbone_files.whole(tensor.site), slot.rank, -slot.scale)
        found[tensor.name] = taken[tensor.site]["AB".index(tensor.part)]
    return found


def _turned(tensor: TensorSpec, value: Tensor) -> Tensor:
    return value.T if tensor.part == "B" else value


PEFT = tuple(
    Peft(
        kind="LORA",
        method=method,
        conv1d=True,
        names={"r": ("r", 8), "alpha": ("lora_alpha", 8)},
        fixed={"init_lora_weights": method, "use_dora": False, "use_rslora": False},
        idle={"lora_dropout": None},
        patterns=LORA_PATTERNS,
        packed=Packed(_pack, _unpack, reads_backbone=True),
        written=False,
    )
    for method in ("pissa", "olora")
)
