"""The layer plan has the bits of transformers' classes, and leaves to them what it does not cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime import layer_program
from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.cache import KVCache, PagedAttention, PagedSequence
from polygraft.grafts.runtime.route import Rows, Span
from polygraft.grafts.runtime.stacks import Resident, Stacks
from tests.compiled import compiled
from tests.grafts.oracle.row import relative

pytestmark = compiled

COVERED = (
    "lora(r=4)",
    "prefix(4)@1 + lora(r=2, at=attn.q|ffn.down)",
    "dora(r=2)",
    "bitfit()",
    "ln-tuning()",
    "serial(4)",
)
LEFT = ("ia3()", "oft(4)", "llama-adapter(3)")
LENGTHS = (5, 17, 1, 30)


def resident(peft: str, backbone: Backbone, seed: int) -> Resident:
    graft, generator = BoundGraft(parse(peft), backbone.shape), torch.Generator().manual_seed(seed)
    values = {t.name: torch.randn(t.shape, generator=generator) / 4 for t in graft.tensors}
    return Resident(f"g{seed}", graft, values)


class Decoding:
    """A sequence of every graft and a bare one, in the cache of a backbone."""

    def __init__(self, backbone: Backbone, residents: Sequence[Resident]) -> None:
        self.backbone, self.stacks = backbone, backbone.stacks(residents)
        self.cache = KVCache(backbone.shape, 60, block_size=8, dtype=backbone.dtype)
        self.cache.clear(range(60))
        self.prefixes = [(r.graft.prefix_length, r.graft.prefix_layers) for r in residents] + [(0, None)]
        self.tables = [tuple(range(1 + 7 * i, 8 + 7 * i)) for i in range(len(self.prefixes))]
        for table, own in zip(self.tables, residents, strict=False):
            self.cache.write_prefix(table, own)
        self.done = [0] * len(self.prefixes)

    def step(self, counts: Mapping[int, int]) -> dict[int, Tensor]:
        """The next `counts` rows of some sequences, in one forward."""
        ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        sequences: list[PagedSequence] = []
        for i, count in counts.items():
            before, start = self.prefixes[i][0] + self.done[i], len(ids)
            ids += [(7 * i + 3 * p) % 500 for p in range(before, before + count)]
            positions += range(before, before + count)
            sequences.append(PagedSequence(start, count, before, self.tables[i], *self.prefixes[i]))
            if i < len(self.stacks.residents):
                spans.append(Span(start, start + count, i))
            self.done[i] += count
        rows = Rows(torch.tensor(ids), torch.tensor(positions), tuple(spans))
        with torch.inference_mode():
            hidden = self.backbone.forward(rows, self.stacks, PagedAttention(self.cache, sequences))
        return {i: hidden[s.start : s.start + s.rows] for i, s in zip(counts, sequences, strict=True)}

    def decode(self, chosen: Sequence[int], steps: int = 4) -> list[Tensor]:
        """Prompts in one forward, then a row a sequence in each."""
        found = [self.step({i: LENGTHS[i % len(LENGTHS)] for i in chosen})]
        found += [self.step(dict.fromkeys(chosen, 1)) for _ in range(steps)]
        return [torch.cat([step[i] for step in found]) for i in chosen]


def decoded(backbone: Backbone, pefts: Sequence[str], chosen: Sequence[int] | None = None) -> list[Tensor]:
    made = Decoding(backbone, [resident(peft, backbone, seed) for seed, peft in enumerate(pefts)])
    return made.decode(range(len(pefts) + 1) if chosen is None else chosen)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each forward that a program ran."""
    rows: list[int] = []
    run = layer_program.LayerProgram.run

    def counted(own: layer_program.LayerProgram, x: Tensor, positions: Tensor, attention: PagedAttention) -> Tensor:
        rows.append(len(x))
        return run(own, x, positions, attention)

    monkeypatch.setattr(layer_program.LayerProgram, "run", counted)
    return rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_states_have_the_bits_of_transformers_classes(
    tiny_folders: Mapping[str, Path], arch: str, dtype: torch.dtype, ran: list[int]
) -> None:
    backbone = Backbone.load(tiny_folders[arch], dtype)
    planned = decoded(backbone, COVERED)
    assert len(ran) == 5
    backbone._plan = None
    assert all(map(torch.equal, planned, decoded(backbone, COVERED)))
    assert len(ran) == 5


@pytest.mark.parametrize("peft", LEFT)
def test_what_it_does_not_cover_is_left_to_the_classes_and_changes_no_neighbours_bits(
    tiny_folder: Path, peft: str, ran: list[int]
) -> None:
    backbone = Backbone.load(tiny_folder, torch.bfloat16)
    mixed = decoded(backbone, ("lora(r=4)", peft))
    assert not ran
    alone = decoded(backbone, ("lora(r=4)",))
    assert ran
    assert torch.equal(mixed[0], alone[0])


@pytest.mark.parametrize("arch", ["gemma", "gpt2"])
def test_other_layers_have_no_plan(tiny_folders: Mapping[str, Path], arch: str) -> None:
    assert Backbone.load(tiny_folders[arch])._plan is None


def test_a_sequence_has_the_same_bits_alone_and_among_all(tiny_folder: Path) -> None:
    backbone = Backbone.load(tiny_folder, torch.bfloat16)
    together = decoded(backbone, COVERED)
    for i in range(len(together)):
        assert torch.equal(decoded(backbone, COVERED, [i])[0], together[i])


def test_decoded_states_are_those_of_the_whole_sequence(tiny_folder: Path) -> None:
    backbone = Backbone.load(tiny_folder, torch.float32)
    own = resident("lora(r=4)", backbone, 0)
    decoding = Decoding(backbone, [own])
    states = decoding.decode([0])[0]
    ids = torch.tensor([3 * p % 500 for p in range(len(states))])
    rows = Rows(ids, torch.arange(len(ids)), (Span(0, len(ids), 0),))
    whole = backbone.forward(rows, decoding.stacks, WholeSequences(((0, len(ids)),), backbone.shape))
    assert relative(states, whole) < 1e-5


def test_a_program_is_made_once_for_the_same_rows_and_few_are_kept(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    of = layer_program.program

    def counted(*given: object) -> object:
        made.append(1)
        return of(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("polygraft.grafts.runtime.layer_plan.program", counted)
    backbone = Backbone.load(tiny_folder, torch.bfloat16)
    decoding = Decoding(backbone, [resident("lora(r=4)", backbone, 0)])
    decoding.decode([0, 1], steps=6)
    assert len(made) == 2  # of the prompts' rows, and of the decoded ones
    assert _programs(decoding.stacks) == 2
    for rows in (10, 20, 30, 40, 50):
        decoding.done = [0, 0]
        decoding.step({0: rows})
    assert _programs(decoding.stacks) == 4


def test_one_program_is_for_any_number_of_rows_of_the_bare_model_and_has_the_bits_of_the_classes(
    tiny_folder: Path, ran: list[int]
) -> None:
    backbone = Backbone.load(tiny_folder, torch.bfloat16)
    counts = [5, 30, 17, 1, 2, 40, 3]

    def steps() -> list[Tensor]:
        decoding = Decoding(backbone, [])
        found = []
        for rows in counts:
            decoding.done = [0]
            found.append(decoding.step({0: rows})[0])
        assert backbone._plan is None or _programs(decoding.stacks) == 1
        return found

    planned = steps()
    assert len(ran) == len(counts)
    backbone._plan = None
    assert all(map(torch.equal, planned, steps()))


def _programs(stacks: Stacks) -> int:
    from polygraft.grafts.runtime.layer_plan import LayerPlan

    return len(stacks.derived((LayerPlan,), dict))
