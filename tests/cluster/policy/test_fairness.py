"""Whose turn it is: the service bound of VTC over random requests, and by example what a tenant cannot gain."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.cluster.model import TenantId
from polygraft.cluster.policy.batching import Running, StepPlan, Waiting, admit_streams
from polygraft.cluster.policy.fairness import ANSWER_TOKEN, PROMPT_TOKEN, Ledger, in_turn
from tests.cluster.policy.engine_in_numbers import BLOCK, Engine, Stream

ANN, BOB, EVE = (TenantId(name) for name in ("ann", "bob", "eve"))


LONGEST, MOST = 12, 10  # tokens of a prompt and of an answer


@settings(max_examples=40)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, LONGEST), st.integers(1, MOST), st.sampled_from([0.5, 1.0, 3.0])),
        min_size=2,
        max_size=4,
    ),
    blocks=st.integers(8, 40),
    streams=st.integers(1, 6),
    rows=st.integers(2, 24),
    seed=st.integers(0, 1 << 32),
)
def test_the_service_of_backlogged_tenants_never_differs_by_more_than_vtcs_bound(
    shapes: list[tuple[int, int, float]], blocks: int, streams: int, rows: int, seed: int
) -> None:
    """Theorem 4.4 over every interval: the difference's largest minus its smallest value is at most 2 U. Of some
    prompts all but a token is computed already, which is no service."""
    weights = {TenantId(f"t{n}"): weight for n, (_, _, weight) in enumerate(shapes)}
    engine = Engine(blocks=blocks, streams=streams, rows=rows, weights=weights)
    numbers, drawn = iter(range(10**6)), random.Random(seed)
    least: dict[tuple[TenantId, TenantId], float] = {}
    largest: dict[tuple[TenantId, TenantId], float] = {}
    for _ in range(160):
        for tenant, (prompt, wanted, _) in zip(weights, shapes, strict=True):  # always two waiting: backlogged
            while sum(one.tenant == tenant for one in engine.queue) < 2:
                length, answer = drawn.randint(1, prompt), drawn.randint(1, wanted)
                known = drawn.choice((0, drawn.randint(0, length - 1)))
                engine.submit(Stream(tenant, next(numbers), length, answer, known))
        assert engine.step().chunks, "something moves in every step"
        for one in weights:
            for other in weights:
                gap = engine.service[one] / weights[one] - engine.service[other] / weights[other]
                least[one, other] = min(least.get((one, other), 0), gap)
                largest[one, other] = max(largest.get((one, other), 0), gap)
    tokens = streams * (LONGEST + MOST)
    bound = 2 * max(PROMPT_TOKEN * LONGEST, ANSWER_TOKEN * tokens) / min(weights.values())
    assert max(largest[pair] - least[pair] for pair in largest) <= bound


def test_equal_tenants_with_unequal_prompts_get_equal_service_and_weights_divide_it() -> None:
    assert (PROMPT_TOKEN, ANSWER_TOKEN) == (1.0, 2.0), "as in the paper's experiments"
    engine = Engine(blocks=400, streams=4, rows=64, weights={EVE: 3.0})
    numbers = iter(range(10**6))
    for _ in range(600):
        for tenant, prompt, wanted in ((ANN, 40, 2), (BOB, 2, 2), (EVE, 8, 8)):
            while sum(one.tenant == tenant for one in engine.queue) < 2:
                engine.submit(Stream(tenant, next(numbers), prompt, wanted))
        engine.step()
    assert engine.service[ANN] / engine.service[BOB] == pytest.approx(1.0, abs=0.05)
    assert engine.service[EVE] / engine.service[BOB] == pytest.approx(3.0, abs=0.15)


def test_a_tenant_whose_prompts_begin_alike_has_as_much_computed_and_more_answers_for_it() -> None:
    """An answer costs eve 2 + 4 and bob 40 + 4."""
    engine, numbers = Engine(blocks=400, streams=4, rows=64, weights={}), iter(range(10**6))
    for _ in range(600):
        for tenant, known in ((BOB, 0), (EVE, 38)):
            while sum(one.tenant == tenant for one in engine.queue) < 4:
                engine.submit(Stream(tenant, next(numbers), 40, 2, known))
        engine.step()
    assert engine.service[EVE] / engine.service[BOB] == pytest.approx(1.0, abs=0.05)
    assert engine.answers[EVE] / engine.answers[BOB] == pytest.approx(44 / 6, rel=0.1)


def turns(ledger: Ledger, *waiting: Waiting, running: Mapping[TenantId, int] | None = None) -> list[str]:
    return [one.id for one in in_turn(waiting, ledger, running or {})]


def wanting(id: str, tenant: TenantId, cost: float = 10.0) -> Waiting:
    return Waiting(id, 4, 4, 1, tenant, cost)


def test_a_queue_of_one_tenant_is_served_as_it_came_and_several_take_turns() -> None:
    ann, bob = [wanting(f"a{n}", ANN) for n in range(4)], [wanting(f"b{n}", BOB, 20.0) for n in range(2)]
    assert turns(Ledger(), *ann) == ["a0", "a1", "a2", "a3"]
    assert turns(Ledger(), *ann, *bob) == ["a0", "b0", "a1", "b1", "a2", "a3"]
    assert turns(Ledger(weights={BOB: 4.0}), *ann, *bob) == ["a0", "b0", "b1", "a1", "a2", "a3"]
    assert turns(Ledger(served={ANN: 15.0}), *ann, *bob) == ["b0", "a0", "b1", "a1", "a2", "a3"]


def test_of_equal_counters_the_tenant_with_fewer_streams_running_is_first() -> None:
    ann, bob = [wanting(f"a{n}", ANN, 0.0) for n in range(3)], [wanting(f"b{n}", BOB, 0.0) for n in range(2)]
    assert turns(Ledger(), bob[0], *ann, bob[1], running={BOB: 2}) == ["a0", "a1", "b0", "a2", "b1"]


def test_a_tenant_that_was_away_saves_up_nothing() -> None:
    ledger = Ledger(served={ANN: 500.0, BOB: 700.0, EVE: 20.0})
    assert ledger.joined(EVE, [ANN, BOB]).counter(EVE) == 500.0 and Ledger().joined(EVE, []).counter(EVE) == 0.0
    assert ledger.left(BOB).joined(EVE, []).counter(EVE) == ledger.joined(BOB, [ANN]).counter(BOB) == 700.0


def test_one_that_is_overdue_goes_first_in_the_order_in_which_they_came() -> None:
    late = replace(wanting("e", EVE), overdue=True), replace(wanting("a0", ANN), overdue=True)
    ledger = Ledger(served={EVE: 900.0, ANN: 100.0})
    assert turns(ledger, wanting("b", BOB), *late, wanting("a1", ANN)) == ["e", "a0", "b", "a1"]


def chosen(waiting: tuple[Waiting, ...], running: tuple[Running, ...], ledger: Ledger, **limits: int) -> StepPlan:
    given = {"free_blocks": 99, "max_streams": 4, "rows": 64, **limits}
    return admit_streams(waiting, running, ledger=ledger, block_size=BLOCK, **given)


def of(tenant: TenantId, *names: str, left: int = 1, held: int = 2) -> tuple[Running, ...]:
    return tuple(Running(name, left, held, 0, 1, tenant) for name in names)


def test_where_all_places_are_taken_the_tenant_with_most_makes_room_for_one_with_less() -> None:
    ledger = Ledger(served={ANN: 50.0})
    found = chosen((wanting("b", BOB),), of(ANN, "a0", "a1", "a2", "a3"), ledger)
    assert found == StepPlan(("a3",), ("b",), (("a0", 1), ("a1", 1), ("a2", 1), ("b", 4)))
    crowd = (*of(ANN, "a0"), *of(BOB, "b0"), *of(EVE, "e0", "e1"))
    assert chosen((wanting("x", TenantId("x")),), crowd, ledger).evicted == ("e1",)
    two = (*of(EVE, "e0", "e1", "e2"), *of(ANN, "a0", "a1"))
    assert chosen((wanting("x", TenantId("x")),), two, Ledger(), max_streams=5).evicted == ("e2",)


def test_nobody_makes_room_for_one_that_was_served_more_or_would_then_have_as_much() -> None:
    full = of(ANN, "a0", "a1", "a2", "a3")
    assert chosen((wanting("b", BOB),), full, Ledger(served={BOB: 1.0})).admitted == ()
    assert chosen((wanting("a4", ANN),), full, Ledger()).evicted == ()
    assert chosen((wanting("b1", BOB),), (*of(ANN, "a0", "a1"), *of(BOB, "b0")), Ledger(), max_streams=3).evicted == ()
    heavier = Ledger(weights={ANN: 3.0})
    assert chosen((wanting("b1", BOB),), (*of(ANN, "a0", "a1", "a2"), *of(BOB, "b0")), heavier).evicted == ()


def test_as_many_make_room_as_the_new_one_needs_or_nobody_does() -> None:
    long = Waiting("b", 12, 12, 1, BOB, 12.0)  # 3 blocks, and one to grow for each that runs and for itself
    ann = of(ANN, "a0", "a1", "a2")
    assert chosen((long,), ann, Ledger(), free_blocks=2).evicted == ("a2", "a1")
    assert chosen((replace(long, slots=40),), ann, Ledger(), free_blocks=2).evicted == ()


def test_who_gave_up_a_place_and_all_after_it_in_turn_wait_for_the_next_step() -> None:
    ledger = Ledger(served={ANN: 50.0, EVE: 60.0})
    waiting = (wanting("a4", ANN), wanting("b", BOB), wanting("e", EVE))
    found = chosen(waiting, of(ANN, "a0", "a1", "a2", "a3", held=20), ledger)
    assert (found.evicted, found.admitted) == (("a3",), ("b",))


def test_the_rows_of_a_step_go_to_prompts_in_turn() -> None:
    ledger = Ledger(served={ANN: 50.0})
    prompts = of(ANN, "a0", "a1", left=40, held=10)
    found = chosen((wanting("b", BOB),), (*prompts, *of(EVE, "e")), ledger, rows=32)
    assert found.chunks == (("e", 1), ("b", 4), ("a0", 5), ("a1", 1))
    alone = chosen((), (*prompts, *of(EVE, "e")), ledger, rows=32)
    assert alone.chunks == (("e", 1), ("a0", 31))


def test_long_prompts_of_others_at_most_double_the_step_of_who_is_first_in_turn() -> None:
    short, long = of(BOB, "b0", "b1", left=10, held=3), of(ANN, "a0", "a1", left=40, held=10)
    decode = of(EVE, *(f"e{n}" for n in range(6)))
    ledger = Ledger(served={ANN: 50.0})
    found = dict(chosen((), (*long, *short, *decode), ledger, rows=99).chunks)
    assert found == {**{f"e{n}": 1 for n in range(6)}, "b0": 10, "b1": 10, "a0": 26, "a1": 1}
    # Who is first in turn has what it wants, however long that is.
    found = dict(chosen((), (*long, *short, *decode), Ledger(served={BOB: 1.0}), rows=99).chunks)
    assert (found["a0"], found["a1"], found["b0"]) == (40, 40, 10)
    # Those that have no more rows than come before them are not held back, however many they are.
    crowd = tuple(one for n in range(8) for one in of(TenantId(f"t{n}"), f"t{n}", left=8, held=2))
    found = dict(chosen((), (*decode, *crowd), Ledger(), rows=64).chunks)
    assert list(found.values()) == [1] * 6 + [8] * 7 + [2]


def test_a_long_prompt_that_must_be_whole_waits_until_its_tenant_is_first_in_turn() -> None:
    whole = Waiting("a", 40, 40, 40, ANN, 40.0)
    both = wanting("b", BOB), whole
    assert chosen(both, (), Ledger(served={ANN: 50.0})).chunks == (("b", 4),)
    assert chosen(both, (), Ledger(served={BOB: 50.0})).chunks == (("a", 40), ("b", 4))
    small = replace(whole, left=4, min_chunk=4)
    assert chosen((wanting("b", BOB), small), (), Ledger(served={ANN: 50.0})).chunks == (("b", 4), ("a", 4))


def test_one_that_waits_for_its_turn_to_be_whole_holds_up_nobody() -> None:
    whole = Waiting("a", 40, 40, 40, ANN, 40.0)
    ledger = Ledger(served={ANN: 50.0, EVE: 60.0})
    assert chosen((wanting("b", BOB), whole, wanting("e", EVE)), (), ledger).chunks == (("b", 4), ("e", 4))


def test_what_a_long_prompt_must_have_at_once_it_gets_where_that_is_there() -> None:
    """Six decoding streams and four rows of bob's: ten rows for long ones, and a row each when these are gone."""
    decode, ledger = of(EVE, *(f"e{n}" for n in range(6))), Ledger(served={ANN: 50.0, EVE: 900.0})

    def rows_of(*long: Waiting) -> list[tuple[str, int]]:
        limits = {"max_streams": 16, "free_blocks": 999}
        return list(chosen((wanting("b", BOB), *long), decode, ledger, **limits).chunks)[7:]

    def ann(name: str, left: int, min_chunk: int = 1) -> Waiting:
        return Waiting(name, left, left, min_chunk, ANN, 0.0)

    assert rows_of(ann("a", 40, 10)) == [("a", 10)]
    assert rows_of(ann("a", 40, 11)) == []
    assert rows_of(ann("a0", 40), ann("a1", 40)) == [("a0", 10), ("a1", 1)]
    assert rows_of(ann("a0", 40), ann("a1", 40, 2)) == [("a0", 10)]
    # No longer than what is there without it, it is not long, and what is long has as much again.
    assert rows_of(ann("a0", 10), ann("a1", 40)) == [("a0", 10), ("a1", 20)]
    assert rows_of(ann("a0", 11), ann("a1", 40)) == [("a0", 10), ("a1", 1)]


def test_who_makes_room_gives_its_rows_to_the_one_that_comes() -> None:
    ledger = Ledger(served={ANN: 50.0})
    ann = of(ANN, "a0", "a1", "a2", "a3")
    assert chosen((wanting("b", BOB),), ann, ledger, rows=5).chunks[-1] == ("b", 2)
    grow = tuple(Running(f"a{n}", 1, 4, 1, 1, ANN) for n in range(3))  # the last one leaves to let the others grow
    assert chosen((wanting("b", BOB),), grow, ledger, free_blocks=2, rows=4) == StepPlan(
        ("a2",), ("b",), (("a0", 1), ("a1", 1), ("b", 2))
    )
    two = chosen((wanting("b", BOB), wanting("e", EVE)), ann, ledger, rows=8)
    assert two == StepPlan(("a3", "a2"), ("b", "e"), (("a0", 1), ("a1", 1), ("b", 4), ("e", 2)))


def test_prompts_that_go_on_cost_their_tenants_nothing_more() -> None:
    ledger = Ledger(served={BOB: 0.5})
    prompts = (*of(BOB, "b", left=4), *of(ANN, "a0", "a1", left=4))
    assert [id for id, _ in chosen((), prompts, ledger).chunks] == ["a0", "a1", "b"]
    again = (Waiting("b", 4, 4, tenant=BOB), Waiting("a0", 4, 4, tenant=ANN), Waiting("a1", 4, 4, tenant=ANN))
    assert chosen(again, (), ledger).admitted == ("a0", "a1", "b")


def padded(rows: int) -> int:
    """Rows that a forward computes, which is what its time grows with."""
    return max(16, -(-rows // 8) * 8)


def waits_of_a_light_tenant(*, crowd: int, long: int) -> tuple[list[float], list[int], int]:
    """In rows that are computed until its first token, for each of its requests, which come at any time of a step; the
    rows of the steps in which they were computed; and those of the longest step. `crowd` streams of one tenant and
    `long` prompts of another are always there."""
    engine = Engine(blocks=600, streams=16, rows=256, weights={})
    numbers, drawn = iter(range(10**6)), random.Random(7)
    waits, own, longest = [], [], 0
    light: Stream | None = None
    waited = 0.0
    for step in range(1200):
        for tenant, wanted, prompt, said in ((ANN, crowd, 8, 60), (EVE, long, 110, 4)):
            while sum(one.tenant == tenant for one in (*engine.queue, *engine.run)) < wanted:
                number = next(numbers)
                engine.submit(Stream(tenant, number, prompt, said + number % 5))
        rows = padded(sum(count for _, count in engine.step().chunks))
        longest = max(longest, rows)
        if light is not None:
            waited += rows
            if light.said:
                waits.append(waited)
                own.append(rows)
                light = None
        if light is None and step >= 100 and step % 3 == 0:
            light = Stream(BOB, next(numbers), 12, 3)
            engine.submit(light)
            waited = drawn.random() * rows  # what was left of the step in which it came
    return waits, own, longest


def test_a_light_tenants_p99_of_time_to_first_token_is_within_twice_that_alone_and_a_step() -> None:
    alone, _, _ = waits_of_a_light_tenant(crowd=0, long=0)
    beside, own, step = waits_of_a_light_tenant(crowd=48, long=24)
    assert min(len(alone), len(beside)) >= 300
    p99 = [sorted(waits)[int(0.99 * len(waits))] for waits in (alone, beside)]
    assert p99[1] <= 2 * p99[0] + step
    # The decoding streams and itself, doubled, but for the few where it came when the long prompts' tenant was first.
    assert sorted(own)[int(0.9 * len(own))] <= 2 * padded(15 + 12)


def test_no_request_waits_beyond_the_bound_however_many_come_after_it() -> None:
    """Tenants without number, each served less than bob: by counters alone bob would never be next."""
    waits = {}
    for patience in (20, 10**6):
        engine, numbers = Engine(blocks=400, streams=2, rows=64, weights={}), iter(range(10**6))
        engine.ledger = Ledger(served={BOB: 10_000.0})
        bob = Stream(BOB, next(numbers), 4, 4)
        engine.queue.append(bob)
        for step in range(200):
            if bob not in engine.queue:
                break
            while len(engine.queue) < 4:
                number = next(numbers)
                engine.queue.append(Stream(TenantId(f"new{number}"), number, 4, 4))
            plan = admit_streams(
                [one.waiting(overdue=step >= patience and one is bob) for one in engine.queue],
                [one.running() for one in engine.run],
                ledger=engine.ledger,
                free_blocks=engine.free,
                block_size=BLOCK,
                max_streams=2,
                rows=64,
            )
            for id in plan.admitted:
                engine._enter(next(one for one in engine.queue if one.id == id))
            for id, rows in plan.chunks:
                stream = next(one for one in engine.run if one.id == id)
                stream.computed, stream.said = stream.computed + rows, stream.said + 1
                if stream.said == stream.wanted:
                    engine._leave(stream)
            waits[patience] = step
    assert waits[20] <= 20 + 4 and waits[10**6] == 199
