"""Who may wait at an engine, and when one that may not should come again."""

from __future__ import annotations

import pytest

from polygraft.cluster.policy.queueing import may_wait, retry_after_s


@pytest.mark.parametrize(
    ("own", "everybody", "answer"),
    [(0, 0, True), (7, 7, True), (8, 8, False), (7, 92, True), (7, 93, False), (0, 99, True), (0, 100, False)],
)
def test_nobody_has_more_than_its_limit_or_than_is_left_for_others(own: int, everybody: int, answer: bool) -> None:
    assert may_wait(own, everybody, per_tenant=8, places=100) is answer


def test_a_place_is_free_after_as_long_as_places_took_to_become_free_for_everyone_who_was_told_before() -> None:
    left = (100.0, 104.0, 110.0)  # three in the 12 s until now
    assert retry_after_s(left, 0, oldest=90.0, now=112.0) == 4.0
    assert retry_after_s(left, 2, oldest=90.0, now=112.0) == 12.0
    assert retry_after_s(left, 0, oldest=90.0, now=160.0) == 20.0  # the queue stands still: the wait grows


def test_while_none_has_left_the_wait_is_as_long_as_the_oldest_has_waited() -> None:
    assert retry_after_s((), 0, oldest=90.0, now=97.5) == 7.5
    assert retry_after_s((), 3, oldest=90.0, now=97.5) == 30.0


def test_nobody_is_sent_away_for_less_than_a_second_or_more_than_an_hour() -> None:
    assert retry_after_s((99.9,), 0, oldest=0.0, now=100.0) == 1.0
    assert retry_after_s((0.0,), 9, oldest=0.0, now=1e6) == 3600.0
