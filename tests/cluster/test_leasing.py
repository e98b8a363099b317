"""Memory of devices is given out once, whoever asks at the same time, and comes back when its holder is over."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from threading import Barrier

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from polygraft.cluster import evolve
from polygraft.cluster.events import DeviceJoined, PackClosed, PackFailed, PackOpening, PackPlaced
from polygraft.cluster.leasing import (
    LeaseRefused,
    close_replica,
    end_pack,
    lease_for_pack,
    open_pack,
    open_replica,
)
from polygraft.cluster.model import START, Device, DeviceId, Occupancy, Pack, PackId, Replica, ReplicaId, Snapshot
from polygraft.cluster.states import Reason
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Fenced, Store, Write
from polygraft.cluster.store.memory import MemoryStore
from tests.cluster.builders import DEVICE_BYTES, make_device

P, R = PackId("pack-p"), ReplicaId("r")


def joined(store: Store, *devices: Device) -> None:
    for device in devices:
        writes = [Write(keys.device(device.id), Occupancy(device=device), 0)]
        store.commit(writes, [DeviceJoined(record=device, at=0.0)])


def of_node(node: str, count: int, **fields: object) -> list[Device]:
    return [make_device(f"{node}/{index}", node=node, index=index, **fields) for index in range(count)]  # type: ignore[arg-type]


def opened(store: Store, bytes_: int = 1, *devices: str, pack: PackId = P) -> Pack:
    ids = tuple(DeviceId(device) for device in devices or ("n/0",))
    event = PackOpening(pack=pack, backbone="b", devices=ids, bytes=bytes_, epoch=1, reason=Reason.JOBS_WAIT, at=0.0)
    return open_pack(store, event)


def replica(store: Store, name: str = R, bytes_: int = 1, node: str = "n", index: int | None = None) -> Replica:
    record, _ = open_replica(
        store,
        ReplicaId(name),
        backbone="b",
        bytes_of=lambda _: bytes_,
        actor=name,
        node=node,
        index=index,
        at=0.0,
    )
    return record


def free(store: Store) -> dict[str, int]:
    return {one.value.device.id: one.value.free for one in store.scan(keys.DEVICES)}


@pytest.fixture
def store() -> Store:
    store = MemoryStore()
    joined(store, *of_node("n", 2), *of_node("m", 1))
    return store


def test_a_pack_takes_its_bytes_of_each_of_its_devices_and_gives_them_back(store: Store) -> None:
    opened(store, 600, "n/0", "m/0")
    assert free(store) == {"n/0": 400, "n/1": 1000, "m/0": 400}
    with pytest.raises(LeaseRefused, match="m/0 has 400 bytes free of the 401 that pack-q asks for"):
        opened(store, 401, "n/1", "m/0", pack=PackId("pack-q"))
    assert store.get(keys.pack(PackId("pack-q"))) is None and free(store)["n/1"] == 1000
    end_pack(store, PackFailed(pack=P, error="lost", at=1.0))
    assert set(free(store).values()) == {1000}


def test_a_replica_takes_the_device_of_its_node_with_most_room(store: Store) -> None:
    opened(store, 300, "n/0")
    assert [replica(store, name, 700).devices for name in "ab"] == [("n/1",), ("n/0",)]
    with pytest.raises(LeaseRefused, match="n/1 has 300 bytes free of the 700"):
        replica(store, "c", 700)
    close_replica(store, ReplicaId("a"), at=1.0)
    assert replica(store, "c", 700).devices == ("n/1",)
    close_replica(store, ReplicaId("a"), at=1.0)  # once more changes nothing
    assert free(store) == {"n/0": 0, "n/1": 300, "m/0": 1000}


def test_a_replica_that_starts_again_gives_back_what_it_held_before(store: Store) -> None:
    replica(store, R, 900)
    replica(store, R, 950)
    assert sorted(free(store).values()) == [50, 1000, 1000]
    replica(store, R, 100, node="m")
    assert free(store) == {"n/0": 1000, "n/1": 1000, "m/0": 900}


def test_a_replica_on_a_gpu_takes_the_one_that_ray_assigned(store: Store) -> None:
    assert replica(store, R, 1, index=1).devices == ("n/1",)
    with pytest.raises(LeaseRefused, match="no device 7 of node n is known yet"):
        replica(store, "s", 1, index=7)
    with pytest.raises(LeaseRefused, match="no device of node elsewhere is known yet"):
        replica(store, "s", 1, node="elsewhere")


def test_replicas_that_start_at_once_on_one_node_take_different_devices(store: Store) -> None:
    together = Barrier(2)

    def start(name: str) -> tuple[DeviceId, ...]:
        together.wait()
        return replica(store, name, DEVICE_BYTES).devices

    with ThreadPoolExecutor(2) as threads:
        assert sorted(threads.map(start, "ab")) == [("n/0",), ("n/1",)]


def test_a_pack_s_process_finds_its_device_on_its_node_alone(store: Store) -> None:
    opened(store, 500, "n/1", "m/0")
    assert lease_for_pack(store, P, node="n", index=None, at=1.0).id == "n/1"
    assert lease_for_pack(store, P, rank=1, node="m", index=None, at=1.0).id == "m/0"
    with pytest.raises(LeaseRefused, match="is meant for n/1, and its process 0 runs on node m"):
        lease_for_pack(store, P, node="m", index=None, at=1.0)
    end_pack(store, PackClosed(pack=P, at=2.0))
    with pytest.raises(LeaseRefused, match="is over"):
        lease_for_pack(store, P, node="n", index=None, at=3.0)


def test_a_pack_on_gpus_moves_its_lease_to_the_one_that_ray_assigned(store: Store) -> None:
    opened(store, 600, "n/0")
    assert lease_for_pack(store, P, node="n", index=0, at=1.0).id == "n/0"
    assert lease_for_pack(store, P, node="n", index=1, at=2.0).id == "n/1"
    assert free(store) == {"n/0": 1000, "n/1": 400, "m/0": 1000}
    found = store.get(keys.pack(P))
    assert found is not None and found.value.devices == ("n/1",)
    assert [one.event for one in store.events(START)][-1] == PackPlaced(pack=P, devices=(DeviceId("n/1"),), at=2.0)
    replica(store, R, 500, index=0)
    with pytest.raises(LeaseRefused, match="n/0 has 500 bytes free of the 600"):
        lease_for_pack(store, P, node="n", index=0, at=3.0)
    assert lease_for_pack(store, P, node="n", index=1, at=3.0).id == "n/1"


def test_processes_of_a_pack_that_ray_gave_each_other_s_gpus_swap_them(store: Store) -> None:
    opened(store, 600, "n/0", "n/1")
    assert lease_for_pack(store, P, rank=0, node="n", index=1, at=1.0).id == "n/1"
    assert lease_for_pack(store, P, rank=1, node="n", index=0, at=1.0).id == "n/0"
    assert free(store) == {"n/0": 400, "n/1": 400, "m/0": 1000}


def test_whoever_is_fenced_out_leases_nothing(store: Store) -> None:
    lease = store.acquire(keys.replica_scope(R), "its process", 30.0)
    assert lease is not None
    store.acquire(keys.replica_scope(R), "the controller", 30.0, steal=True)
    with pytest.raises(Fenced):
        open_replica(
            store,
            R,
            backbone="b",
            bytes_of=lambda device: device.bytes,
            actor="r",
            node="n",
            index=None,
            at=0.0,
            fence=lease.fence,
        )
    assert set(free(store).values()) == {1000}


DEVICES = st.lists(st.sampled_from(["n/0", "n/1", "m/0"]), min_size=1, max_size=3, unique=True)
BYTES = st.integers(0, DEVICE_BYTES + 1)
PACKS, REPLICAS = st.sampled_from(["pack-1", "pack-2", "pack-3"]), st.sampled_from(["r-1", "r-2", "r-3"])


class Leasing(RuleBasedStateMachine):
    """Packs and replicas that come and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()
        joined(self.store, *of_node("n", 2), *of_node("m", 1))

    @rule(name=PACKS, bytes_=BYTES, devices=DEVICES)
    def open_a_pack(self, name: str, bytes_: int, devices: list[str]) -> None:
        if self.store.get(keys.pack(PackId(name))) is None:
            try:
                opened(self.store, bytes_, *devices, pack=PackId(name))
            except LeaseRefused:
                assert any(bytes_ > left for device, left in free(self.store).items() if device in devices)

    @rule(name=PACKS)
    def end_a_pack(self, name: str) -> None:
        found = self.store.get(keys.pack(PackId(name)))
        if found is not None and not found.value.final:
            end_pack(self.store, PackFailed(pack=PackId(name), error="x", at=1.0))

    @rule(name=PACKS, index=st.sampled_from([None, 0, 1]))
    def place_a_pack(self, name: str, index: int | None) -> None:
        with suppress(LeaseRefused):
            lease_for_pack(self.store, PackId(name), node="n", index=index, at=1.0)

    @rule(name=REPLICAS, bytes_=BYTES, node=st.sampled_from("nm"), index=st.sampled_from([None, 0]))
    def open_a_replica(self, name: str, bytes_: int, node: str, index: int | None) -> None:
        before = free(self.store)
        try:
            replica(self.store, name, bytes_, node, index)
        except LeaseRefused:
            assert free(self.store) == before

    @rule(name=REPLICAS)
    def close_a_replica(self, name: str) -> None:
        close_replica(self.store, ReplicaId(name), at=1.0)

    @invariant()
    def the_bytes_given_out_are_those_of_packs_and_replicas_and_no_more_than_there_are(self) -> None:
        snapshot = reduce(lambda s, one: evolve.apply(s, one.id, one.event), self.store.events(START), Snapshot())
        records = {one.value.device.id: one.value for one in self.store.scan(keys.DEVICES)}
        assert records.keys() == snapshot.devices.keys()
        for device, record in records.items():
            assert 0 <= record.free == snapshot.free_bytes(device)
            packs = {one.id: one.bytes for one in snapshot.packs.values() if device in one.devices and not one.final}
            replicas = {one.id: one.bytes for one in snapshot.replicas.values() if device in one.devices}
            expected = sorted([*packs.items(), *replicas.items()])
            assert sorted((one.holder, one.bytes) for one in record.holders) == expected


Leasing.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
TestLeasing = Leasing.TestCase


def test_a_device_that_shrinks_gives_nothing_out_until_there_is_room_again(store: Store) -> None:
    opened(store, 600, "n/0")
    found = store.get(keys.device(DeviceId("n/0")))
    assert found is not None
    smaller = replace(found.value, device=replace(found.value.device, bytes=500))
    store.commit([Write(keys.device(DeviceId("n/0")), smaller, found.version)])
    assert free(store)["n/0"] == -100 and replica(store, R, 1).devices == ("n/1",)
    with pytest.raises(LeaseRefused):
        replica(store, "s", 1, index=0)
