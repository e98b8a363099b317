"""What a pack takes of which devices: the bytes that its backbone's sizes were made for, never more than are left."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygraft.cluster.model import Backbone, Device, DeviceId, PackId, ReplicaId, Snapshot
from polygraft.cluster.policy.devices import DeviceSet, FreeDevices, Use, share_bytes, taken_bytes
from polygraft.cluster.policy.standing import Kind
from polygraft.cluster.size import Size
from tests.cluster.builders import make_backbone, make_device, make_pack, make_replica, make_snapshot

ONE = Kind("b", 1)


def sized(name: str = "b", **bytes_: int) -> Backbone:
    return make_backbone(name, sizes=tuple(Size(f"{use}.bytes", each, each) for use, each in bytes_.items()))


def fleet(*devices: Device, backbones: tuple[Backbone, ...] = ()) -> Snapshot:
    return replace(make_snapshot(backbones=backbones), devices={device.id: device for device in devices})


def test_without_sizes_a_pack_takes_half_of_a_device_and_with_them_what_they_were_made_for() -> None:
    large = make_device("large", bytes_=1000)
    assert FreeDevices(fleet(large)).take(ONE) == DeviceSet((DeviceId("large"),), 500)
    assert FreeDevices(fleet(large, backbones=(sized(pack=300),))).take(ONE) == DeviceSet((DeviceId("large"),), 300)


def test_a_smaller_device_that_came_later_is_none_for_a_pack_that_does_not_fit_there() -> None:
    small, large = make_device("small", bytes_=400), make_device("large", bytes_=1000)
    both = fleet(small, large, backbones=(sized(pack=500), sized("c", pack=200)))
    free = FreeDevices(both)
    assert (free.count(ONE), free.count(Kind("c", 1))) == (1, 2)
    assert free.take(ONE) == DeviceSet((DeviceId("large"),), 500)
    assert free.take(ONE) is None and not free.has(ONE)
    assert free.take(Kind("c", 1)) == DeviceSet((DeviceId("small"),), 200)
    assert not FreeDevices(fleet(small, backbones=(sized(pack=500),))).has(ONE)


@pytest.mark.parametrize(("replica", "free"), [(500, 1), (700, 1), (701, 0)])
def test_beside_a_replica_a_pack_has_what_that_leaves(replica: int, free: int) -> None:
    snapshot = fleet(make_device("d", bytes_=1000), backbones=(sized(pack=300),))
    snapshot = replace(snapshot, replicas={ReplicaId("r"): make_replica(bytes=replica)})
    assert FreeDevices(snapshot).count(ONE) == free


def test_what_is_kept_for_who_comes_first_is_given_to_nobody() -> None:
    free = FreeDevices(fleet(make_device("d"), backbones=(sized(pack=10),)))
    free.keep()
    assert (free.count(ONE), free.take(ONE)) == (0, None)


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
            found = FreeDevices(now).take(Kind(name, count))
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
