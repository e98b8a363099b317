"""Methods over grafts that were trained before and stay as they are; `of` names them. `r` or `size` is the largest that
one of the others has; where one has nothing, it adds nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.additive.adapters import act_of
from polygraft.grafts.methods.declare import Hook, Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.ranges import Alpha, Projections, Rank, Sublayers, Width
from polygraft.grafts.sites import Site
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError, source_names

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.bound import BoundGraft
    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec

Values = Mapping[str, "Tensor"]
Parts = Mapping[str, TensorDecl]


def meteora(r: Rank = 8, at: Projections = "linear", top: int = 2, *, of: str = "one|two") -> tuple[Slot, ...]:
    """Trained LoRAs stay as they are and a gate weighs them row by row: y += sum_i w_i s_i B_i A_i x with w a softmax
    over the `top` highest of G x at every site (Xu et al. 2024, arXiv 2405.13053, section 3).

    `of` names them; `r` is the largest rank that one has, and where one has nothing it adds nothing.

    Deviations: None known in the forward; the paper's accelerated kernels for it are others than ours.

    Choose when: several finished LoRAs are to be combined by what is asked, and examples of all their uses are at hand.
    """
    count = len(source_names(of))
    form, top = DeclRef("meteora", (("of", of),)), min(top, count)
    return (Branch(at=at, rank=count * r, gate="softmax", experts=count, top=top, form=form),)


def output_gated_loras(r: Rank = 8, at: Projections = "linear", *, of: str = "one|two") -> tuple[Slot, ...]:
    """Trained LoRAs stay as they are and a gate that reads what they give weighs them: y += sum_i w_i E_i x with w =
    softmax(e [E_1 x; ...; E_N x]) and E_i = s_i B_i A_i, row by row (after MoLE: Wu et al. 2024, arXiv 2404.13628,
    eq. 9 to 13).

    `of` names them; `r` is the largest rank that one has.

    Deviations: MoLE weighs the outputs of whole blocks, which it normalises and reads flattened over the sequence, so
    that all rows have the same weights, by a trained temperature and with a loss that balances the gate; here the gate
    is linear in its own row alone, and hence the name.

    Choose when: LoRAs are to be combined by what they do rather than by the input; `meteora` has the smaller gate.
    """
    count = len(source_names(of))
    return (Branch(at=at, rank=count * r, gate="softmax", experts=count, form=DeclRef("output-gated", (("of", of),))),)


def o_lora(
    r: Rank = 8, alpha: Alpha = 16.0, at: Projections = "linear", old: int = 8, penalty: float = 0.5, *, of: str = "one"
) -> tuple[Slot, ...]:
    """One LoRA more beside trained ones, kept orthogonal to them by a penalty lambda sum |A_i A^T|^2 (Wang et al. 2023,
    arXiv 2310.14152, eq. 6 to 8).

    `of` names the others, which are part of the graft; `old` is the largest rank of them, `penalty` lambda.

    Deviations: The authors' code takes the absolute values of A_i A^T in place of their squares; the paper's formula is
    followed. Its L2 penalty on the new LoRA is left to weight_decay.

    Choose when: tasks come one after another and the earlier ones must not suffer.
    """
    if r < 1:
        raise SpecError(f"peft: r: {r} is not a size; give at least 1")
    form = DeclRef("o-lora", (("of", of), ("r", r), ("scale", alpha / r)))
    return (Branch(at=at, rank=r + old * len(source_names(of)), form=form),)


def _penalties(
    r: int = 8, alpha: float = 16.0, at: str = "linear", old: int = 8, penalty: float = 0.5, *, of: str = "one"
) -> tuple[DeclRef, ...]:
    return (DeclRef("o-lora", (("weight", penalty),)),)


def fusion(size: Width = 64, act: str = "gelu", at: Sublayers = "ffn.out", *, of: str = "one|two") -> tuple[Slot, ...]:
    """AdapterFusion: every row attends to the outputs z_i of trained adapters, h + sum_i softmax_i((h Q) (z_i K)^T) z_i
    V (Pfeiffer et al. 2021, arXiv 2005.00247, section 3.2).

    `of` names serial adapters without biases, at the places that they stand at; `size` is the largest of theirs.

    Deviations: V starts as the identity as in AdapterHub; its regulariser, which keeps V there, is left out.

    Choose when: several adapters know parts of a task. Q, K and V are dense [hidden, hidden] at each site, which is far
    larger than the adapters.
    """
    count = len(source_names(of))
    form, rank = DeclRef("fusion", (("of", of),)), count * size
    return (Branch(at=at, rank=rank, act=act_of(act), tap="output", gate="attention", experts=count, form=form),)


def _others(slot: Branch, place: SiteShape, of: str, rank: int | None = None) -> Parts:
    start, rank = DeclRef("of_others", (("of", of),)), slot.rank if rank is None else rank
    return {
        "A": TensorDecl((rank, place.d_in), start, trained=False),
        "B": TensorDecl((rank, place.d_out), start, trained=False),
    }


def _meteora_own(slot: Branch, place: SiteShape, of: str) -> Parts:
    return {**_others(slot, place, of), "G": TensorDecl((slot.experts, place.d_in), "kaiming")}


def _as_they_are(slot: Branch, values: Values, lowering: Lowering, of: str) -> Values:
    return values


def _output_gated_own(slot: Branch, place: SiteShape, of: str) -> Parts:
    return {**_others(slot, place, of), "e": TensorDecl((slot.experts, slot.experts * place.d_out))}


def _output_gated(slot: Branch, values: Values, lowering: Lowering, of: str) -> Values:
    """e [E_1; ...; E_N] is linear in the row."""
    A, B = (values[part].view(slot.experts, slot.rank // slot.experts, -1) for part in "AB")
    e = values["e"].view(slot.experts, slot.experts, -1).transpose(0, 1)  # [of which output, for which expert, d]
    return {"A": values["A"], "B": values["B"], "G": (e @ B.mT @ A).sum(0)}


def _o_lora_own(slot: Branch, place: SiteShape, of: str, r: int, scale: float) -> Parts:
    others = {f"{part}0": one for part, one in _others(slot, place, of, slot.rank - r).items()}
    return {"A": TensorDecl((r, place.d_in), "kaiming"), "B": TensorDecl((r, place.d_out)), **others}


def _o_lora(slot: Branch, values: Values, lowering: Lowering, of: str, r: int, scale: float) -> Values:
    import torch

    return {"A": torch.cat([values["A"], values["A0"]]), "B": torch.cat([scale * values["B"], values["B0"]])}


def _overlap(values: Values, weight: float) -> Tensor:
    import torch

    sites = [name.removesuffix(".A0") for name in values if name.endswith(".A0")]
    overlaps = [(values[f"{site}.A0"] @ values[f"{site}.A"].T).square().sum() for site in sites]
    return weight * torch.stack(overlaps).sum()


def _fusion_own(slot: Branch, place: SiteShape, of: str) -> Parts:
    square = (place.d_out, place.d_out)
    return {
        **_others(slot, place, of),
        "Q": TensorDecl(square, "kaiming"),
        "K": TensorDecl(square, "kaiming"),
        "V": TensorDecl(square, "eye"),
    }


def _fusion(slot: Branch, values: Values, lowering: Lowering, of: str) -> Values:
    """(h Q) (a B K)^T is the inner product of hidden values a and B K Q^T h."""
    A, B, Q, K, V = (values[part] for part in "ABQKV")
    return {"A": A, "B": B @ V, "G": B @ K @ Q.T}


def _eye(tensor: TensorSpec, making: Making) -> Tensor:
    import torch

    return torch.eye(*tensor.shape)


def _taken(tensor: TensorSpec, making: Making, of: str) -> Tensor:
    """A's or B's rows of every source at the site, B's with their factors, padded with zeros to the same number."""
    import torch

    names, part = source_names(of), tensor.part[0]
    share = tensor.shape[0] // len(names)
    made = torch.zeros(tensor.shape)
    for i, name in enumerate(names):
        source, first = making.source(name), i * share
        for index, slot in _at(source.graft, tensor.site):
            rows = source.tensors[f"{index}.{tensor.site}.{part}"]
            made[first : first + len(rows)] = rows * (slot.scale if part == "B" else 1.0)
            first += len(rows)
    return made


def _check(tensor: TensorSpec, graft: BoundGraft, sources: Mapping[str, BoundGraft], of: str) -> None:
    """Every source is branches of our kind, at no other sites, and no larger; `old` is as large as one of them."""
    own, names = graft.spec.slots[tensor.slot], source_names(of)
    assert isinstance(own, Branch) and own.form is not None and tensor.site is not None
    share, largest = tensor.shape[0] // len(names), 0
    sites = graft.places[tensor.slot].keys()
    for name in names:
        plain = sources[name].plain
        for slot in plain.spec.slots:
            like = isinstance(slot, Branch) and (slot.act, slot.tap, slot.bias, slot.gate) == (
                own.act,
                own.tap,
                False,
                "none",
            )
            if not like:
                kind = "a LoRA" if own.act == "identity" else f"an adapter with {own.act} and no biases"
                raise SpecError(f"of: {name!r} is {plain.spec.method!r}, not {kind}")
        ranks = _ranks(plain)
        if beside := ranks.keys() - sites:
            raise SpecError(f"at: {name!r} also acts at {min(beside)}, where {graft.spec.method!r} does not")
        if (size := ranks[tensor.site]) > share:
            raise SpecError(f"of: {name!r} has rank {size} at {tensor.site}, more than {share}; give that")
        largest = max(largest, *ranks.values())
    if own.form.name == "o-lora" and share > largest:
        raise SpecError(f"old: {share} is more than the largest rank of {of!r}; give {largest}")


def _ranks(graft: BoundGraft) -> Counter[Site]:
    """The ranks of all branches at a site together."""
    found: Counter[Site] = Counter()
    for index, site in graft.sites:
        slot = graft.spec.slots[index]
        if isinstance(slot, Branch):
            found[site] += slot.rank
    return found


def _at(graft: BoundGraft, site: Site | None) -> Iterator[tuple[int, Branch]]:
    for index, where in graft.sites:
        slot = graft.spec.slots[index]
        if where == site and isinstance(slot, Branch):
            yield index, slot


METHODS = (
    Method("meteora", "arXiv 2405.13053", 1e-3, meteora),
    Method("output-gated-loras", "arXiv 2404.13628", 1e-3, output_gated_loras),
    Method("o-lora", "arXiv 2310.14152", 3e-4, o_lora, hooks=_penalties),
    Method("fusion", "arXiv 2005.00247", 1e-4, fusion, aliases=("adapter-fusion",)),
)
PARAMETRIZATIONS = (
    Parametrization("meteora", _as_they_are, _meteora_own),
    Parametrization("output-gated", _output_gated, _output_gated_own, formerly="mole"),
    Parametrization("o-lora", _o_lora, _o_lora_own),
    Parametrization("fusion", _fusion, _fusion_own),
)
STARTS = (Start("of_others", _taken, _check), Start("eye", _eye))
HOOKS = (Hook("o-lora", penalty=_overlap),)
