"""The service's searches: begun, begun again after a driver's death, ended; with drivers that are played."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from polygraft.cluster.api_keys import list_keys, verify_key
from polygraft.cluster.model import Job, JobId, Search, StudyId, TenantId
from polygraft.cluster.states import JobState, SearchState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Write
from polygraft.cluster.store.memory import MemoryStore
from polygraft.tuning.keeper import PAUSE_S, STARTS, Ended, Keeper, in_turn
from tests.cluster.builders import make_job

EVE, STUDY = TenantId("eve"), StudyId("study-1")


@dataclass
class Played:
    """A driver that is over when it is told so."""

    search: Search
    key: str
    over: Ended | None = None
    killed: bool = False

    def ended(self) -> Ended | None:
        return self.over

    def kill(self) -> None:
        self.killed = True


@dataclass
class World:
    store: MemoryStore = field(default_factory=MemoryStore)
    drivers: list[Played] = field(default_factory=list)
    now: float = 100.0

    def __post_init__(self) -> None:
        self.keeper = self.another()
        self.store.commit([Write(keys.search(STUDY), Search(id=STUDY, tenant=EVE, name="find", created_at=1.0), 0)])

    def another(self, most: int = 8) -> Keeper:
        def begin(search: Search, key: str) -> Played:
            self.drivers.append(Played(search, key))
            return self.drivers[-1]

        return Keeper(self.store, begin, lambda: self.now, most=most)

    @property
    def search(self) -> Search:
        return self.found(STUDY)

    def found(self, search: str) -> Search:
        found = self.store.get(keys.search(StudyId(search)))
        assert found is not None
        return found.value

    def begun(self, search: str, tenant: str, at: float) -> None:
        made = Search(id=StudyId(search), tenant=TenantId(tenant), name="find", created_at=at)
        self.store.commit([Write(keys.search(made.id), made, 0)])

    def change(self, **fields: object) -> None:
        found = self.store.get(keys.search(STUDY))
        assert found is not None
        self.store.commit([Write(found.key, replace(found.value, **fields), found.version)])  # type: ignore[arg-type]

    def job(self, number: int, owner: str | None) -> Job:
        job = replace(make_job(f"ftjob-{number}"), owner=owner, tenant=EVE)
        self.store.commit([Write(keys.job(job.id), job, 0)])
        return job


def test_a_search_gets_one_driver_with_a_key_of_its_tenant() -> None:
    world = World()
    world.keeper.tick()
    world.keeper.tick()
    (driver,) = world.drivers
    found = verify_key(world.store, driver.key)
    assert found is not None and found.tenant == EVE
    assert driver.search.id == STUDY and world.search.starts == 1


def test_a_search_whose_driver_is_done_has_succeeded_and_its_key_opens_nothing() -> None:
    world = World()
    world.keeper.tick()
    world.drivers[0].over = Ended(note="the space is used up")
    world.now = 160.0
    world.keeper.tick()
    assert (world.search.state, world.search.note, world.search.finished_at) == (
        SearchState.SUCCEEDED,
        "the space is used up",
        160.0,
    )
    assert verify_key(world.store, world.drivers[0].key) is None
    (entry,) = [entry for _, entry in world.store.read(keys.search_log(STUDY))]
    assert entry["message"] == "succeeded: the space is used up"
    world.keeper.tick()
    assert len(world.drivers) == 1


def test_a_driver_that_dies_is_followed_by_another_after_a_pause() -> None:
    world = World()
    world.keeper.tick()
    world.drivers[0].over = Ended(fault="it was killed")
    world.keeper.tick()
    world.keeper.tick()
    assert len(world.drivers) == 1
    world.now += PAUSE_S
    world.keeper.tick()
    assert len(world.drivers) == 2 and world.search.starts == 2
    assert verify_key(world.store, world.drivers[0].key) is None
    assert verify_key(world.store, world.drivers[1].key) is not None
    assert sum(key.revoked_at is None for key in list_keys(world.store, EVE)) == 1


def test_another_keeper_goes_on_with_what_was_running() -> None:
    world = World()
    world.keeper.tick()
    world.keeper.stop()
    assert world.drivers[0].killed
    world.another().tick()
    assert len(world.drivers) == 2 and world.search.state is SearchState.RUNNING


def test_a_search_that_no_driver_can_go_on_with_has_failed() -> None:
    world = World()
    world.keeper.tick()
    world.drivers[0].over = Ended(fault="study: its record is of another version", for_good=True)
    world.keeper.tick()
    assert (world.search.state, world.search.note) == (
        SearchState.FAILED,
        "study: its record is of another version",
    )
    world = World()
    world.change(starts=STARTS - 1)
    world.keeper.tick()
    world.drivers[0].over = Ended(fault="out of memory")
    world.keeper.tick()
    assert (world.search.state, world.search.note) == (SearchState.FAILED, "out of memory")


def test_a_cancelled_search_loses_its_driver_and_only_its_own_jobs() -> None:
    world = World()
    world.keeper.tick()
    own, other = world.job(1, f"{STUDY}/0"), world.job(2, "study-2/0")
    alone = world.job(3, None)
    world.change(cancel_requested=True)
    world.keeper.tick()
    assert world.drivers[0].killed and world.search.state is SearchState.CANCELLED
    asked = {id: _found(world, id).cancel_requested for id in (own.id, other.id, alone.id)}
    assert asked == {own.id: True, other.id: False, alone.id: False}
    assert _found(world, own.id).state is JobState.QUEUED
    world.keeper.tick()
    assert len(world.drivers) == 1


def test_searches_beyond_the_bound_wait_and_say_so_until_another_one_ends() -> None:
    world = World()
    keeper = world.another(most=2)
    world.begun("study-2", "eve", 2.0)
    world.begun("study-3", "eve", 3.0)
    for _ in range(3):
        keeper.tick()
    assert [driver.search.id for driver in world.drivers] == ["study-1", "study-2"]
    waits = "waits until another search ends: 2 run at once, of all tenants (limits.searches)"
    assert (world.found("study-3").state, world.found("study-3").note) == (SearchState.RUNNING, waits)
    said = [entry["message"] for _, entry in world.store.read(keys.search_log(StudyId("study-3")))]
    assert said == [waits]
    world.drivers[0].over = Ended()
    keeper.tick()
    assert world.drivers[2].search.id == "study-3" and world.found("study-3").note is None
    assert world.search.state is SearchState.SUCCEEDED


def test_a_search_that_waits_is_cancelled_without_ever_having_had_a_driver() -> None:
    world = World()
    world.begun("study-0", "eve", 0.0)
    keeper = world.another(most=1)
    keeper.tick()
    world.change(cancel_requested=True)
    keeper.tick()
    assert world.search.state is SearchState.CANCELLED and world.search.starts == 0
    assert [driver.search.id for driver in world.drivers] == ["study-0"]


def test_a_search_whose_driver_died_keeps_its_place() -> None:
    world = World()
    world.begun("study-0", "bob", 0.0)
    keeper = world.another(most=1)
    world.change(starts=1)
    keeper.tick()
    world.drivers[0].over = Ended(fault="it was killed")
    keeper.tick()
    world.now += PAUSE_S
    keeper.tick()
    assert [driver.search.id for driver in world.drivers] == [STUDY, STUDY]
    assert world.found("study-0").starts == 0


def test_the_next_place_goes_to_the_tenant_with_the_fewest_and_then_to_the_oldest_search() -> None:
    def of(tenant: str, at: float) -> Search:
        return Search(id=StudyId(f"{tenant}-{at:g}"), tenant=TenantId(tenant), name="find", created_at=at)

    waiting = [of("eve", 5.0), of("eve", 4.0), of("bob", 7.0), of("bob", 6.0), of("ann", 8.0)]
    chosen = [search.id for search in in_turn(waiting, [of("eve", 1.0)], 4)]
    assert chosen == ["bob-6", "ann-8", "eve-4", "bob-7"]
    assert in_turn(waiting, [], 0) == []


def _found(world: World, id: JobId) -> Job:
    found = world.store.get(keys.job(id))
    assert found is not None
    return found.value
