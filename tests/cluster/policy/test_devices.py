"""Which devices a pack gets: those with most memory left, of one make, on one node where that is possible."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polygraft.cluster.model import Device, DeviceId, Replica
from polygraft.cluster.policy.devices import DeviceSet, FreeDevices
from polygraft.cluster.states import PackState
from tests.cluster.builders import make_device, make_pack, make_replica, make_snapshot


def free(*devices: Device, replicas: tuple[Replica, ...] = (), held: str = "") -> FreeDevices:
    packs = (make_pack(devices=(DeviceId(held),)),) if held else ()
    snapshot = make_snapshot(replicas=replicas, packs=packs)
    return FreeDevices(replace(snapshot, devices={device.id: device for device in devices}))


def names(found: DeviceSet | None) -> str | None:
    return None if found is None else " ".join(found.devices)


def test_the_one_with_most_memory_left_goes_first_then_by_id() -> None:
    replicas = (make_replica("r", bytes=100), make_replica("s", bytes=150))
    given = free(make_device("d"), make_device("e", bytes_=800), make_device("f", bytes_=800), replicas=replicas)
    assert given.count == 3
    assert [given.take(1) for _ in range(4)] == [
        DeviceSet((DeviceId("e"),), 400),
        DeviceSet((DeviceId("f"),), 400),
        DeviceSet((DeviceId("d"),), 500),  # 750 are left of it
        None,
    ]
    assert given.count == 0


@pytest.mark.parametrize(("bytes", "taken"), [(500, "d"), (501, None)])
def test_a_replica_may_leave_just_what_a_pack_takes(bytes: int, taken: str | None) -> None:
    assert names(free(make_device("d"), replicas=(make_replica(bytes=bytes),)).take(1)) == taken


def test_a_device_with_a_pack_has_room_for_no_other() -> None:
    assert names(free(make_device("d"), make_device("e"), held="d").take(1)) == "e"
    over = make_snapshot(packs=(make_pack(state=PackState.CLOSED),))
    assert names(FreeDevices(over).take(1)) == "d"


def test_several_are_of_one_make_gpus_first_then_those_with_many_cores() -> None:
    def two(name: str, **fields: object) -> list[Device]:
        return [make_device(f"{name}{n}", **fields) for n in range(2)]  # type: ignore[arg-type]

    given = free(*two("a", cores=2), *two("b", cores=4), *two("c", kind="cuda", cores=1))
    assert [names(given.take(2)) for _ in range(4)] == ["c0 c1", "b0 b1", "a0 a1", None]
    mixed = free(make_device("a", cores=2), make_device("b", cores=4))
    assert not mixed.has(2) and mixed.has(1) and mixed.take(2) is None and mixed.count == 2


def test_several_are_on_one_node_where_one_has_so_many() -> None:
    here = [make_device(f"m{n}", node="m", bytes_=1000) for n in range(2)]
    there = [make_device(f"n{n}", node="n", bytes_=900) for n in range(3)]
    assert names(free(*here, *there).take(3)) == "n0 n1 n2"
    assert names(free(*here, *there).take(2)) == "m0 m1"
    assert names(free(here[0], *there).take(2)) == "n0 n1"
    spread = free(*here, *there).take(4)
    assert spread == DeviceSet(tuple(map(DeviceId, ("m0", "m1", "n0", "n1"))), 450), "the smallest one says how much"


def test_what_is_kept_for_who_comes_first_is_given_to_nobody_in_this_round() -> None:
    given = free(make_device("d"))
    given.keep()
    assert (given.count, given.has(1), given.take(1)) == (0, False, None)
