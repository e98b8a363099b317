"""Which devices a pack gets: those with most memory left, of one make, on one node where that is possible; and what it
takes of them: the bytes that its backbone's sizes were made for, never more than are left."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygraft.cluster.model import Backbone, Device, DeviceId, PackId, Replica, ReplicaId, Snapshot
from polygraft.cluster.policy.devices import DeviceSet, FreeDevices, Use, share_bytes, taken_bytes
from polygraft.cluster.policy.standing import Kind
from polygraft.cluster.size import Size
from polygraft.cluster.states import PackState
from tests.cluster.builders import make_backbone, make_device, make_pack, make_replica, make_snapshot


def free(*devices: Device, replicas: tuple[Replica, ...] = (), held: str = "") -> FreeDevices:
    packs = (make_pack(devices=(DeviceId(held),)),) if held else ()
    snapshot = make_snapshot(replicas=replicas, packs=packs)
    return FreeDevices(replace(snapshot, devices={device.id: device for device in devices}))


def of(count: int, backbone: str = "b") -> Kind:
    return Kind(backbone, count)


def names(found: DeviceSet | None) -> str | None:
    return None if found is None else " ".join(found.devices)


def test_the_one_with_most_memory_left_goes_first_then_by_id() -> None:
    replicas = (make_replica("r", bytes=100), make_replica("s", bytes=150))
    offered = free(make_device("d"), make_device("e", bytes_=800), make_device("f", bytes_=800), replicas=replicas)
    assert offered.count(of(1)) == 3
    assert [offered.take(of(1)) for _ in range(4)] == [
        DeviceSet((DeviceId("e"),), 400),
        DeviceSet((DeviceId("f"),), 400),
        DeviceSet((DeviceId("d"),), 500),  # 750 are left of it
        None,
    ]
    assert offered.count(of(1)) == 0


def test_packs_of_three_backbones_get_a_device_each() -> None:
    offered = free(make_device("d"), make_device("e"), make_device("f"))
    assert [names(offered.take(of(1, backbone))) for backbone in "bceg"] == ["d", "e", "f", None]


@pytest.mark.parametrize(("bytes", "taken"), [(500, "d"), (501, None)])
def test_a_replica_may_leave_just_what_a_pack_takes(bytes: int, taken: str | None) -> None:
    assert names(free(make_device("d"), replicas=(make_replica(bytes=bytes),)).take(of(1))) == taken


def test_a_device_with_a_pack_has_room_for_no_other() -> None:
    assert names(free(make_device("d"), make_device("e"), held="d").take(of(1))) == "e"
    over = make_snapshot(packs=(make_pack(state=PackState.CLOSED),))
    assert names(FreeDevices(over).take(of(1))) == "d"


def test_several_are_of_one_make_gpus_first_then_those_with_many_cores() -> None:
    def two(name: str, **fields: object) -> list[Device]:
        return [make_device(f"{name}{n}", **fields) for n in range(2)]  # type: ignore[arg-type]

    offered = free(*two("a", cores=2), *two("b", cores=4), *two("c", kind="cuda", cores=1))
    assert [names(offered.take(of(2))) for _ in range(4)] == ["c0 c1", "b0 b1", "a0 a1", None]
    mixed = free(make_device("a", cores=2), make_device("b", cores=4))
    assert not mixed.has(of(2)) and mixed.has(of(1)) and mixed.take(of(2)) is None and mixed.count(of(1)) == 2


def test_several_are_on_one_node_where_one_has_so_many() -> None:
    here = [make_device(f"m{n}", node="m", bytes_=1000) for n in range(2)]
    there = [make_device(f"n{n}", node="n", bytes_=900) for n in range(3)]
    assert names(free(*here, *there).take(of(3))) == "n0 n1 n2"
    assert names(free(*here, *there).take(of(2))) == "m0 m1"
    assert names(free(here[0], *there).take(of(2))) == "n0 n1"
    spread = free(*here, *there).take(of(4))
    assert spread == DeviceSet(tuple(map(DeviceId, ("m0", "m1", "n0", "n1"))), 450), "the smallest one says how much"


def test_what_is_kept_for_who_comes_first_is_given_to_nobody_in_this_round() -> None:
    offered = free(make_device("d"))
    offered.keep()
    assert (offered.count(of(1)), offered.has(of(1)), offered.take(of(1))) == (0, False, None)


def sized(name: str = "b", **bytes_: int) -> Backbone:
    return make_backbone(name, sizes=tuple(Size(f"{use}.bytes", each, each) for use, each in bytes_.items()))


def fleet(*devices: Device, backbones: tuple[Backbone, ...] = ()) -> Snapshot:
    return replace(make_snapshot(backbones=backbones), devices={device.id: device for device in devices})


def test_without_sizes_a_pack_takes_half_of_a_device_and_with_them_what_they_were_made_for() -> None:
    large = make_device("large", bytes_=1000)
    assert FreeDevices(fleet(large)).take(of(1)) == DeviceSet((DeviceId("large"),), 500)
    assert FreeDevices(fleet(large, backbones=(sized(pack=300),))).take(of(1)) == DeviceSet((DeviceId("large"),), 300)


def test_a_smaller_device_that_came_later_is_none_for_a_pack_that_does_not_fit_there() -> None:
    small, large = make_device("small", bytes_=400), make_device("large", bytes_=1000)
    both = fleet(small, large, backbones=(sized(pack=500), sized("c", pack=200)))
    free = FreeDevices(both)
    assert (free.count(of(1)), free.count(of(1, "c"))) == (1, 2)
    assert free.take(of(1)) == DeviceSet((DeviceId("large"),), 500)
    assert free.take(of(1)) is None and not free.has(of(1))
    assert free.take(of(1, "c")) == DeviceSet((DeviceId("small"),), 200)
    assert not FreeDevices(fleet(small, backbones=(sized(pack=500),))).has(of(1))


@pytest.mark.parametrize(("replica", "free"), [(500, 1), (700, 1), (701, 0)])
def test_beside_a_replica_a_pack_has_what_that_leaves(replica: int, free: int) -> None:
    snapshot = fleet(make_device("d", bytes_=1000), backbones=(sized(pack=300),))
    snapshot = replace(snapshot, replicas={ReplicaId("r"): make_replica(bytes=replica)})
    assert FreeDevices(snapshot).count(of(1)) == free


USES = st.tuples(st.sampled_from(["pack", "serve"]), st.sampled_from("bcd"), st.integers(1, 2))


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=5),
    st.dictionaries(st.sampled_from("bc"), st.integers(1, 600)),
    st.lists(USES, max_size=30),
)
def test_however_packs_and_replicas_come_no_device_gives_out_more_than_it_has(
    sizes: list[int], takes: dict[str, int], comes: list[tuple[Use, str, int]]
) -> None:
    """Replicas take a device where its bytes are left, as leases do; the backbone d has no sizes."""
    devices = [make_device(f"d{at}", bytes_=each) for at, each in enumerate(sizes)]
    known = (*(sized(name, pack=each, serve=each) for name, each in takes.items()), make_backbone("d"))
    now = fleet(*devices, backbones=known)
    for at, (use, name, count) in enumerate(comes):
        backbone = now.backbones.get(name)
        if use == "pack":
            found = FreeDevices(now).take(of(count, name))
            if found is not None:
                pack = make_pack(f"{at}", backbone=name, devices=found.devices, bytes=found.bytes)
                now = replace(now, packs={**now.packs, PackId(pack.id): pack})
        else:
            room = [one for one in devices if now.free_bytes(one.id) >= taken_bytes(use, backbone, one)]
            if room:
                taken = taken_bytes(use, backbone, room[0])
                replica = make_replica(f"{at}", devices=(room[0].id,), bytes=taken)
                now = replace(now, replicas={**now.replicas, replica.id: replica})
        assert all(now.free_bytes(device.id) >= 0 for device in devices)
        used = [device for pack in now.packs.values() for device in pack.devices]
        assert len(used) == len(set(used)), "a device has one pack"


@given(st.integers(1, 1 << 40))
def test_a_pack_and_a_replica_without_sizes_fit_one_device(bytes_: int) -> None:
    device = make_device(bytes_=bytes_)
    assert 2 * share_bytes(device) <= bytes_
