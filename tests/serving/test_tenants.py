"""What a replica keeps of its tenants: their accounts, who is overdue, and what one that is refused is told."""

from __future__ import annotations

import pytest

from polygraft.cluster.model import TenantId
from polygraft.cluster.settings import ServeSettings
from polygraft.serving.messages import QueueFull
from polygraft.serving.sequence import Sequence
from polygraft.serving.tenants import Tenants
from tests.serving.engines import request

ANN, BOB, EVE = (TenantId(name) for name in ("ann", "bob", "eve"))
SETTINGS = ServeSettings(
    max_streams=2, max_queued=3, max_queued_in_all=10, patience_s=30.0, tenant_weights={"bob": 2.0}
)


def one(tenant: TenantId, id: str = "a", *, at: float = 0.0, prompt: int = 4, attempt: int = 0) -> Sequence:
    return Sequence(request=request(id, (5,) * prompt, 9, tenant=tenant, attempt=attempt), arrival=at)


def test_a_prompt_is_charged_once_when_it_enters_and_an_answer_token_by_token() -> None:
    tenants, first, second, third = Tenants(SETTINGS), one(ANN), one(BOB, prompt=6), one(EVE)
    for sequence in (first, second, third):
        tenants.queued(sequence)
    for sequence in (first, second, third):
        tenants.entered(sequence, 1.0)
    assert (first.entered, second.entered, third.entered) == (0, 1, 2)
    assert (tenants.ledger.counter(ANN), tenants.ledger.counter(BOB)) == (4.0, 3.0), "bob's weight is 2"
    tenants.entered(first, 2.0)  # it had to leave, and is back
    assert (first.entered, tenants.ledger.counter(ANN)) == (0, 4.0)
    tenants.said([first, second, first])
    assert (tenants.ledger.counter(ANN), tenants.ledger.counter(BOB)) == (8.0, 4.0)


def test_a_tenant_that_comes_anew_begins_where_those_who_wait_are() -> None:
    tenants, ann, bob = Tenants(SETTINGS), one(ANN), one(BOB)
    for sequence in (ann, bob):
        tenants.queued(sequence)
        tenants.entered(sequence, 0.0)
    tenants.said([ann] * 10 + [bob] * 5)  # 24 and 11
    tenants.unqueued(bob)
    again = one(ANN, "b")
    tenants.queued(again)
    tenants.unqueued(ann)
    tenants.queued(one(EVE))
    assert tenants.ledger.counter(EVE) == 24.0, "ann still has one waiting"
    tenants.queued(bob)
    assert tenants.ledger.counter(BOB) == 24.0
    for sequence in (again, bob):
        tenants.unqueued(sequence)
    assert tenants.ledger.last == 24.0


def test_the_first_of_a_tenants_is_overdue_after_its_patience_and_one_that_was_elsewhere_at_once() -> None:
    tenants = Tenants(SETTINGS)
    a, b, other, resumed = one(ANN, "a"), one(ANN, "b"), one(BOB), one(EVE, attempt=1)

    def overdue(*waiting: Sequence, now: float) -> list[bool]:
        tenants.mark_overdue(waiting, now)
        return [sequence.overdue for sequence in waiting]

    assert overdue(a, b, resumed, now=100.0) == [False, False, True]
    assert overdue(a, b, other, now=129.5) == [False, False, False]
    assert overdue(a, b, other, now=130.0) == [True, False, False]
    assert overdue(b, other, now=131.0) == [False, False], "b's own time begins when a has gone"
    assert overdue(b, other, now=159.5) == [False, True]
    assert overdue(a, b, now=161.0) == [False, False], "one that came before it takes its time away"


def test_nobody_may_wait_beyond_its_own_places_or_what_is_left_for_others() -> None:
    tenants = Tenants(SETTINGS)
    mine = [one(ANN, f"{n}", at=10.0 + n) for n in range(5)]
    assert tenants.refusal(ANN, mine[:4], 20.0) is None
    assert tenants.refusal(ANN, mine, 20.0) == QueueFull(10.0), "the oldest has waited so long, and none has left"
    assert tenants.refusal(ANN, mine, 20.0) == QueueFull(20.0), "after whom was told before"
    assert tenants.refusal(BOB, mine, 20.0) is None
    others = [one(EVE, f"{n}") for n in range(8)]
    assert (
        tenants.refusal(ANN, (*others, *mine[:2]), 20.0) is not None
    )  # two places of twelve are left, and ann has two
    assert tenants.refusal(ANN, (*others, *mine[:1]), 20.0) is None


def test_who_is_refused_waits_as_its_last_departures_took_and_those_who_were_told_before() -> None:
    tenants = Tenants(SETTINGS)
    for n in range(40):
        tenants.entered(one(ANN, f"{n}"), float(n * n))
    mine = [one(ANN, f"w{n}") for n in range(5)]
    each = (1600 - 8 * 8) / 32  # the last 32 departures
    assert [tenants.refusal(ANN, mine, 1600.0) for _ in range(3)] == [QueueFull(n * each) for n in (1, 2, 3)]
    tenants.entered(one(ANN, "next"), 1600.0)
    assert tenants.refusal(ANN, mine, 1600.0) == QueueFull(pytest.approx(3 * (1600 - 81) / 32)), "one has had its place"  # type: ignore[arg-type]
    assert tenants.refusal(ANN, mine[:1], 1600.0) is None
    assert tenants.refusal(ANN, mine, 1600.0) == QueueFull(pytest.approx((1600 - 81) / 32)), "there was a place: anew"  # type: ignore[arg-type]
