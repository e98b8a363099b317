"""How many replicas a backbone has."""

from __future__ import annotations

from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from polygraft.cluster.policy.scaling import Demand, Lately, Scaling, looked, target

RULES = Scaling(holds=4, least=1, most=8, calm_s=10.0)
STEP_S = 0.5


class Backbone:
    """Replicas that follow the target at once, looked at every STEP_S seconds."""

    def __init__(self, rules: Scaling = RULES, replicas: int = 1) -> None:
        self.rules, self.replicas, self.now = rules, replicas, 0.0
        self.restart()

    def restart(self) -> None:
        """Whoever decides has lost what it saw."""
        self.lately = Lately(self.now, self.now)

    def look(self, streams: int, *, waiting: int = 0, seconds: float = STEP_S) -> int:
        demand = Demand(streams, waiting)
        for _ in range(ceil(seconds / STEP_S)):
            self.now += STEP_S
            self.lately = looked(self.lately, demand, self.rules, self.now)
            self.replicas = target(self.lately, demand, self.rules, self.replicas, self.now)
        return self.replicas


def test_streams_that_do_not_fit_get_a_replica_at_once() -> None:
    backbone = Backbone()
    assert backbone.look(4) == 1
    assert backbone.look(5) == 2
    assert backbone.look(5, waiting=8) == 4
    assert backbone.look(100) == 8  # there are no more


def test_replicas_go_after_a_calm_time_and_leave_room() -> None:
    backbone = Backbone()
    backbone.look(12)
    assert backbone.look(6, seconds=9) == 3
    assert backbone.look(7, seconds=9) == 3
    assert backbone.look(6, seconds=9) == 3  # two were not enough, for their three quarters, until now
    assert backbone.look(6, seconds=2) == 2
    assert backbone.look(0, seconds=60) == 1


def test_a_backbone_that_nobody_asks_for_has_none_and_the_first_request_gets_one() -> None:
    rules = Scaling(holds=4, least=2, most=8, calm_s=10.0, idle_s=30.0)
    backbone = Backbone(rules, replicas=0)
    assert backbone.look(0, seconds=60) == 0
    assert backbone.look(0, waiting=1) == 2
    assert backbone.look(1, seconds=60) == 2
    assert backbone.look(0, seconds=29) == 2
    assert backbone.look(0, seconds=2) == 0


def test_fewer_devices_mean_fewer_replicas_at_once() -> None:
    backbone = Backbone()
    backbone.look(32)
    backbone.rules = Scaling(holds=4, least=1, most=3, calm_s=10.0)
    assert backbone.look(32) == 3


rules = st.builds(
    Scaling,
    holds=st.integers(1, 5),
    least=st.integers(1, 2),
    most=st.integers(2, 6),
    calm_s=st.sampled_from([0.0, 2.0, 5.0]),
    idle_s=st.sampled_from([None, 1.0, 8.0]),
)
story = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3), st.booleans()), max_size=60)


@given(rules, st.integers(0, 6), story)
def test_whatever_is_asked_for(rules: Scaling, replicas: int, story: list[tuple[int, int, bool]]) -> None:
    """Within the bounds; enough for all at once where there are as many; none go before the calm and the idle time;
    a restart only keeps replicas longer."""
    backbone = Backbone(rules, min(replicas, rules.most))
    history: list[tuple[float, int]] = []
    looked_since = busy_at = 0.0
    for streams, waiting, restart in story:
        if restart:
            backbone.restart()
            looked_since = busy_at = backbone.now
            history = []
        before, total = backbone.replicas, streams + waiting
        after = backbone.look(streams, waiting=waiting)
        history.append((backbone.now, total))
        busy_at = backbone.now if total else busy_at
        assert 0 <= after <= rules.most
        if total or rules.idle_s is None:
            assert after >= min(rules.most, max(rules.least, ceil(total / rules.holds)))
        if after == 0 and before > 0:
            assert rules.idle_s is not None and backbone.now - busy_at >= rules.idle_s
        elif after < before:
            assert backbone.now - looked_since >= rules.calm_s
            recent = [total for at, total in history if at > backbone.now - rules.calm_s]
            assert all(total <= 0.75 * rules.holds * after for total in recent) or after == rules.most


@given(rules, st.integers(0, 6), st.integers(0, 30), st.integers(0, 30))
def test_a_steady_demand_settles_and_stays(rules: Scaling, replicas: int, total: int, other: int) -> None:
    """And one that swings within what its replicas hold moves nothing."""
    backbone = Backbone(rules, min(replicas, rules.most))
    settled = backbone.look(total, seconds=40)
    assert {backbone.look(total) for _ in range(20)} == {settled}
    held = ceil(total / rules.holds)
    if total and settled == held and rules.least < held <= rules.most:
        low = int(0.75 * rules.holds * (held - 1)) + 1
        for swing in (low, total, max(low, min(other, held * rules.holds)), total):
            assert backbone.look(swing, seconds=20) == settled


def test_what_several_ingresses_want_is_wanted_together() -> None:
    assert Demand(3, 1) + Demand(4, 2) == Demand(7, 3) and Demand(7, 3).total == 10


def test_a_look_counts_until_the_calm_time_after_it_is_over() -> None:
    lately = looked(Lately(0.0, 0.0), Demand(9), RULES, now=1.0)  # three replicas of three places each
    assert lately == Lately(0.0, 1.0, ((1.0, 3),))
    assert looked(lately, Demand(2), RULES, now=10.9).peaks == ((1.0, 3), (10.9, 1))
    assert looked(lately, Demand(2), RULES, now=11.0).peaks == ((11.0, 1),)
    assert looked(lately, Demand(9), RULES, now=2.0).peaks == ((2.0, 3),), "one as high takes its place"
    assert looked(lately, Demand(0, 0), RULES, now=2.0).busy_at == 1.0


def test_replicas_may_go_as_soon_as_the_calm_or_the_idle_time_is_over() -> None:
    rules = Scaling(holds=4, least=1, most=8, calm_s=10.0, idle_s=30.0)
    seen = Lately(since=0.0, busy_at=10.0, peaks=((9.9, 1),))
    assert [target(seen, Demand(1), rules, 3, now) for now in (9.9, 10.0)] == [3, 1]
    assert [target(seen, Demand(), rules, 1, now) for now in (39.9, 40.0)] == [1, 0]
