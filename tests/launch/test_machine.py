"""How a machine is split into devices, when that is refused, and how fast they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from polygraft.cluster.actors.discovery import NodeFacts
from polygraft.cluster.settings import LimitSettings, Settings
from polygraft.grafts.runtime import speed
from polygraft.launch import search_driver
from polygraft.launch.machine import Machine
from polygraft.launch.scout import NodeScout

GIB = 1 << 30


def test_a_machine_is_one_device_unless_told_or_one_a_gpu() -> None:
    assert Machine(cores=8, bytes=GIB, gpus=0).devices(None) == 1
    assert Machine(cores=8, bytes=GIB, gpus=0).devices(3) == 3
    assert Machine(cores=8, bytes=GIB, gpus=2).devices(None) == 2


def test_a_machine_drives_as_many_searches_as_its_cores_and_half_of_its_memory_allow() -> None:
    assert Machine(cores=2, bytes=23 * GIB, gpus=0).searches == 8
    assert Machine(cores=32, bytes=23 * GIB, gpus=1).searches == 11
    assert Machine(cores=1, bytes=GIB, gpus=0).searches == 1


def test_a_keeper_is_bound_by_the_setting_and_else_by_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[int] = []
    monkeypatch.setattr(Machine, "here", lambda _: Machine(cores=1, bytes=64 * GIB, gpus=0))
    monkeypatch.setattr(search_driver, "Keeper", lambda *_, most: bounds.append(most))
    for limits in (LimitSettings(searches=3), LimitSettings()):
        search_driver.keeper_of(Settings(store_url="memory://", limits=limits), "http://127.0.0.1:1")
    assert bounds == [3, 4]


@pytest.mark.parametrize(
    ("machine", "asked", "words"),
    [
        (Machine(cores=2, bytes=16 * GIB, gpus=0), 3, ("3 are asked for", "has 2 cores", "at most 2")),
        (Machine(cores=16, bytes=16 * GIB, gpus=0), 10, ("of 10", "1.6 GiB", "takes 2.0", "at most 8")),
        (Machine(cores=16, bytes=GIB, gpus=0), 1, ("of 1", "1.0 GiB", "takes 2.0", "smaller backbone")),
        (Machine(cores=16, bytes=16 * GIB, gpus=4), 2, ("2 are asked for", "4 GPUs", "leave it out")),
    ],
)
def test_more_devices_than_a_machine_has_are_refused_with_its_numbers(
    machine: Machine, asked: int, words: tuple[str, ...]
) -> None:
    refusal = machine.refusal(asked, 2 * GIB)
    assert refusal is not None and refusal.startswith("devices: ") and all(word in refusal for word in words)


def test_as_many_devices_as_a_machine_has_are_not_refused() -> None:
    assert Machine(cores=2, bytes=4 * GIB, gpus=0).refusal(2, 2 * GIB) is None
    assert Machine(cores=2, bytes=4 * GIB, gpus=4).refusal(4, 2 * GIB) is None


def test_a_device_is_measured_once_and_with_its_own_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    measured = speed.product_speed

    def counted(device: str, threads: int) -> float:
        asked.append((device, threads))
        return measured(device, threads)

    monkeypatch.setattr(speed, "product_speed", counted)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    scout = NodeScout(tmp_path, gpus=False)
    first = scout(1)
    assert first.cpu_speed > 1e8, "a slow machine multiplies ten thousand times as fast as that"
    assert scout(1) == NodeScout(tmp_path, gpus=False)(1) == first and asked == [("cpu", 1)]
    scout(2)
    assert asked == [("cpu", 1), ("cpu", 2)], "more threads are another class"
    for file in tmp_path.iterdir():
        file.write_text("not ours")
    assert isinstance(scout(1), NodeFacts) and len(asked) == 3


def test_a_speed_that_was_measured_beside_other_work_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = iter((1e9, 2e9, 3e9))
    loads = iter((100.0, 0.0))
    monkeypatch.setattr(speed, "product_speed", lambda device, threads: next(speeds))
    monkeypatch.setattr("os.getloadavg", lambda: (next(loads), 0.0, 0.0))
    scout = NodeScout(tmp_path, gpus=False)
    assert [scout(1).cpu_speed for _ in range(3)] == [1e9, 2e9, 2e9]
