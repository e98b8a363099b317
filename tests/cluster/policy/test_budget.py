"""What a pack still takes, and what it has for one example of a job that is alone in it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polygraft.cluster.model import Limits
from polygraft.cluster.policy.budget import Budget, ExampleRoom, bytes_of, job_bytes, limits_of, state_bytes
from polygraft.cluster.size import Size
from polygraft.cluster.states import Reason
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.cost import StepCost
from polygraft.grafts.grammar import parse
from polygraft.grafts.sites import ModelShape
from tests.cluster.builders import make_backbone, make_job

LIMITS = Limits(max_jobs=2, pack_bytes=1000, max_rows=10, row_bytes=20)  # 800 bytes for state: 50 parameters
SHAPE = ModelShape("llama", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=500)


def test_a_jobs_state_is_what_its_trained_and_its_other_numbers_take() -> None:
    assert state_bytes(10, 3) == 172
    assert bytes_of(make_job(parameters=10, frozen=3)) == 172
    assert bytes_of(make_job(parameters=None)) == 0


def test_a_pack_takes_jobs_while_places_and_bytes_last() -> None:
    assert (job_bytes(LIMITS), job_bytes(Limits())) == (800, None)
    budget = Budget(LIMITS)
    assert budget.refusal(make_job(parameters=50)) is None
    assert budget.refusal(make_job(parameters=51)) is Reason.PACK_MEMORY
    assert Budget(Limits()).refusal(make_job(parameters=10**9)) is None
    budget.take(make_job(parameters=20))
    assert (budget.jobs, budget.bytes) == (1, 480)
    assert budget.refusal(make_job(parameters=30)) is None
    assert budget.refusal(make_job(parameters=31)) is Reason.PACK_MEMORY
    budget.take(make_job(parameters=5))
    assert budget.refusal(make_job(parameters=1)) is Reason.PACK_FULL


def test_a_pack_whose_rows_take_all_of_it_has_nothing_for_a_jobs_state() -> None:
    assert Budget(replace(LIMITS, pack_bytes=200)).bytes == 0
    assert Budget(Limits(pack_bytes=1)).refusal(make_job(parameters=1)) is Reason.PACK_MEMORY


def test_what_a_pack_holds_already_is_not_there_for_others() -> None:
    budget = Budget(LIMITS, jobs=1, bytes=320)
    assert (budget.jobs, budget.bytes) == (1, 480)
    assert budget.holds(make_job(parameters=5), 1, 80) and not budget.holds(make_job(parameters=5), 1, 79)
    assert not budget.holds(make_job(parameters=5), 0, 80)
    assert Budget(Limits()).holds(make_job(parameters=5), 1, 0)


def test_a_backbones_packs_are_as_its_sizes_say_but_for_what_was_given() -> None:
    sizes = (Size("pack.max_jobs", 7, 7), Size("pack.memory_bytes", 900, 100), Size("serve.max_rows", 5, 5))
    backbone, limits = make_backbone(sizes=sizes), replace(LIMITS, given=("max_jobs",))
    assert limits_of(limits, backbone) == replace(limits, pack_bytes=900)
    assert limits_of(LIMITS, backbone) == replace(LIMITS, max_jobs=7, pack_bytes=900)
    assert limits_of(limits, make_backbone()) == limits_of(limits, None) == limits


def room(most: int, shape: ModelShape = SHAPE) -> ExampleRoom:
    return ExampleRoom(StepCost(BoundGraft(parse("lora(r=2)"), shape), 2, 64), most)


def test_an_example_has_what_the_jobs_state_leaves_of_a_pack() -> None:
    cost = room(0).cost
    state = 16 * cost.graft.parameters
    enough = state + cost.bytes([99])
    assert (room(enough).state, room(enough).bytes) == (state, cost.bytes([99]))
    assert room(state - 5).bytes == 0
    assert room(enough).refusal(100) is None
    assert room(enough - 1).refusal(100) == (
        f"has 100 tokens, of which a step takes about {cost.bytes([99]):,} bytes, {cost.row_bytes:,} a token and more "
        f"for attention; a pack has {cost.bytes([99]) - 1:,} for it: {enough - 1:,} less {state:,} of the job's own "
        "state; shorten it (max_length) or take a smaller peft"
    )


@pytest.mark.parametrize("rows", [1, 7, 100, 333])
def test_the_longest_example_is_the_last_one_that_is_not_refused(rows: int) -> None:
    here = room(room(0).state + room(0).cost.bytes([rows]))
    assert here.longest > rows
    assert here.refusal(here.longest) is None and here.refusal(here.longest + 1) is not None


def test_no_example_is_longer_than_the_positions_or_a_million_tokens() -> None:
    assert room(1 << 60).longest == 1 + (1 << 20)
    assert room(1 << 60, replace(SHAPE, positions=40)).longest == 41
    assert room(room(0).state).longest == 1, "none fits"
