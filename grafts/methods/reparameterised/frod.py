"""FRoD: W in a basis that all layers share.

V = R^T E for the stacked W = Q R of all layers and the eigenvectors E of the mean over layers of (Q_i^T Q_i + a I)^-1.
U is made of W and V when it is needed, its columns those of W V^-T at length 1, and V^-T kept for that, as a sum of two
so that it has the digits of float64: along what no layer's W reads a column is a rounding error of PEFT's, at length 1
as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.exchange import Packed, Peft
from polygraft.grafts.methods.ranges import Density, Projections
from polygraft.grafts.methods.reparameterised.spectral import on_projections
from polygraft.grafts.spec import DeclRef, Delta, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.formats.backbone_files import BackboneFiles
    from polygraft.grafts.init import Making
    from polygraft.grafts.sites import Site
    from polygraft.grafts.sizes import TensorSpec
    from polygraft.grafts.spec import GraftSpec

Values = Mapping[str, "Tensor"]
_SHORT = 1e-12  # a column of no length


def frod(rate: Density = 0.01, ridge: float = 1e-3, at: Projections = "attn.[qv]") -> tuple[Slot, ...]:
    """W is written anew as U (diag(l) + S) V^T, with a basis V shared by the same projection of all layers, and l and a
    sparse S are trained, so that the change has full rank (doi 10.1609/aaai.v40i31.39813, as PEFT 0.21 has it).

    `rate` is the share of S's entries beside the diagonal that are trained, `ridge` what is added before inverting.

    Deviations: Held against PEFT, whose computation of V is followed step by step, since it makes V again when it loads
    a folder.

    Choose when: full rank is wanted from about a hundredth of the numbers. Its start takes a QR of all layers' W, its
    step a dense dW.
    """
    if not 0 < rate <= 1 or ridge <= 0:
        raise SpecError(f"peft: frod: rate {rate} is outside (0, 1], or ridge {ridge} not over 0")
    return (Delta(at=on_projections(at), form=DeclRef("frod", (("rate", rate), ("ridge", ridge)))),)


def _own(slot: Delta, place: SiteShape, rate: float, ridge: float) -> Mapping[str, TensorDecl]:
    lengths = DeclRef("frod-lengths", (("ridge", ridge),))
    return {"l": TensorDecl((place.d_in,), lengths), "s": TensorDecl((_count(place.d_in, rate),))}


def _shared(slot: Delta, places: Sequence[SiteShape], rate: float, ridge: float) -> Mapping[str, TensorDecl]:
    found: dict[str, TensorDecl] = {}
    for place in places:
        name, square = place.name, (place.d_in, place.d_in)
        basis = DeclRef("frod-basis", (("name", name), ("ridge", ridge)))
        found[_part("V", name)] = TensorDecl(square, basis, trained=False)
        found[_part("inverse", name)] = TensorDecl((2, *square), basis, trained=False)
        entries = DeclRef("off-diagonal", (("width", place.d_in),))
        found[_part("i", name)] = TensorDecl((_count(place.d_in, rate), 2), entries, trained=False)
    return found


def _operands(slot: Delta, values: Values, lowering: Lowering, rate: float, ridge: float) -> Values:
    import torch

    name = lowering.place.name
    V, inverse, where = (values[_part(part, name)] for part in ("V", "inverse", "i"))
    W = lowering.weight().to(V.dtype)
    U = _columns(W, inverse)[0].to(V.dtype)
    rows, columns = where.long().T
    return {"W": U @ torch.diag(values["l"]).index_put((rows, columns), values["s"]) @ V.T - W}


def _columns(W: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of W V^-T at length 1, or 0, and their lengths, float64."""
    columns = W.double() @ inverse.double().sum(0)
    lengths = columns.norm(dim=0)
    return (columns / lengths.clamp_min(_SHORT)).where(lengths > _SHORT, 0.0), lengths


def _count(width: int, rate: float) -> int:
    return max(1, min(int(width * width * rate), width * (width - 1)))


def _part(part: str, name: str) -> str:
    return f"{part}_{name.replace('.', '_')}"


def basis(matrices: Sequence[Tensor], ridge: float) -> Tensor:
    """V [in, in] of the W [out, in] of all layers, in float32 and the order of PEFT's steps, which makes it again when
    it loads a folder."""
    import torch

    stacked = torch.cat([matrix.to(torch.float32) for matrix in matrices])
    if len(stacked) < stacked.shape[1]:
        Vh: Tensor = torch.linalg.svd(stacked, full_matrices=True)[2]
        return Vh.T
    Q, R = torch.linalg.qr(stacked)
    eye, mean = torch.eye(len(R), dtype=R.dtype), torch.zeros_like(R)
    for part in Q.split([len(matrix) for matrix in matrices]):
        mean += torch.linalg.inv(part.T @ part + ridge * eye)
    mean /= len(matrices)
    V: Tensor = R.T @ torch.linalg.eigh(mean)[1]
    return V


def _inverse(V: Tensor) -> Tensor:
    """V^-T as the sum over a first dimension of float32 and what that leaves over."""
    import torch

    try:
        whole: Tensor = torch.linalg.inv(V.double()).T
    except RuntimeError:  # as in PEFT, for a basis that W does not fill
        whole = torch.linalg.pinv(V.double(), rtol=1e-6).T
    first = whole.float()
    return torch.stack([first, (whole - first).float()])


def _pair(slot: int, name: str, making: Making, ridge: float) -> tuple[Tensor, Tensor]:
    """V of the projections of that name, and V^-T."""

    def make() -> tuple[Tensor, Tensor]:
        sites = making.graft.places[slot]
        V = basis([making.weight(site) for site in sites if site.name == name], ridge)
        return V, _inverse(V)

    return making.once(("frod", slot, name), make)


def _basis(tensor: TensorSpec, making: Making, name: str, ridge: float) -> Tensor:
    return _pair(tensor.slot, name, making, ridge)[tensor.part.startswith("inverse")]


def _lengths(tensor: TensorSpec, making: Making, ridge: float) -> Tensor:
    assert tensor.site is not None
    _, inverse = _pair(tensor.slot, tensor.site.name, making, ridge)
    return _columns(making.weight(tensor.site), inverse)[1]


def _off_diagonal(tensor: TensorSpec, making: Making, width: int) -> Tensor:
    """Row and column of different entries at random."""
    import torch

    chosen = torch.randperm(width * (width - 1), generator=making.generator(tensor.name))[: tensor.shape[0]]
    rows, columns = chosen // (width - 1), chosen % (width - 1)
    return torch.stack([rows, columns + (columns >= rows)], 1)


METHODS = (Method("frod", "doi 10.1609/aaai.v40i31.39813", 1e-3, frod),)
PARAMETRIZATIONS = (Parametrization("frod", _operands, _own, _shared),)
STARTS = (
    Start("frod-basis", _basis),
    Start("frod-lengths", _lengths),
    Start("off-diagonal", _off_diagonal),
)
_KEPT = {"l": "frod_lambda_l", "s": "frod_lambda_s_values"}


def _pack(
    values: Values,
    layout: Sequence[TensorSpec],
    module: Callable[..., str],
    backbone_files: BackboneFiles,
    spec: GraftSpec,
) -> Values:
    """PEFT reads V but makes U of the one that it makes of W itself, which is to be the same."""
    import torch

    found = {f"{module(t.site)}.{_KEPT[t.part]}": values[t.name] for t in layout if t.site is not None}
    for slot, name, sites, category in _categories(layout, module):
        V, where = (values[f"{slot}.shared.{_part(part, name)}"] for part in "Vi")
        form = spec.slots[slot].form
        assert form is not None
        if bool(V.any()):  # without values only the keys are asked for
            again = basis([backbone_files.whole(site) for site in sites], float(form.keywords()["ridge"]))
            if (again - V).norm() > 1e-4 * again.norm():
                raise SpecError(f"{name}: PEFT makes V of W again, and it is not this graft's; keep the native folder")
        found[f"base_model.frod_V.{category}"] = V
        found[f"base_model.frod_s_indices.{category}"] = where.T.long()
        found[f"base_model.frod_s_size.{category}"] = torch.tensor(V.shape)
    return found


def _unpack(
    stored: Values,
    layout: Sequence[TensorSpec],
    module: Callable[..., str],
    backbone_files: BackboneFiles,
    spec: GraftSpec,
) -> Values:
    found = {t.name: stored[f"{module(t.site)}.{_KEPT[t.part]}"] for t in layout if t.site is not None}
    for slot, name, _, category in _categories(layout, module):
        V = stored[f"base_model.frod_V.{category}"]
        where = stored[f"base_model.frod_s_indices.{category}"].T
        if int(where.min()) < 0 or int(where.max()) >= len(V):
            raise SpecError(f"frod_s_indices.{category}: holds entries outside of {len(V)} rows and columns")
        parts = {"V": V, "inverse": _inverse(V), "i": where}
        found |= {f"{slot}.shared.{_part(part, name)}": value for part, value in parts.items()}
    return found


def _categories(layout: Sequence[TensorSpec], module: Callable[..., str]) -> Iterator[tuple[int, str, list[Site], str]]:
    """Slot, projection, its sites, and what PEFT calls their modules: by the last two parts of their paths, but for an
    attention's output in BERT and for what a layer holds itself."""
    together: dict[tuple[int, str], list[Site]] = {}
    for tensor in layout:
        if tensor.site is not None and tensor.part == "l":
            together.setdefault((tensor.slot, tensor.site.name), []).append(tensor.site)
    for (slot, name), sites in together.items():
        *before, last = module(sites[0]).split(".")
        if before[-2:] == ["attention", "output"]:
            category = "attention_output"
        else:
            category = last if before[-1].isdigit() else f"{before[-1]}_{last}"
        yield slot, name, sites, category


PEFT = (
    Peft(
        kind="FROD",
        method="frod",
        conv1d=True,
        names={"rate": ("sparse_rate", 0.01), "ridge": ("regularization_alpha", 1e-3)},
        needs={"save_projection": True},
        idle={
            "init_weights": True,
            "projection_prng_key": None,
            "frod_dropout": None,
            "progressbar": True,
            "runtime_offload_base_weight": None,
        },
        packed=Packed(_pack, _unpack, reads_backbone=True),
    ),
)
