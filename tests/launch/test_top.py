"""`polygraft top` on one screen."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from polygraft.cluster.size import Size
from polygraft.cluster.states import Reason
from polygraft.cluster.view import LoadView, view
from polygraft.launch.commands.top import shown
from tests.cluster.builders import make_backbone, make_job, make_pack, make_replica, make_snapshot


def printed(**parts: object) -> str:
    snapshot = make_snapshot(**parts)  # type: ignore[arg-type]
    sized = make_backbone("b", sizes=(Size("pack.max_jobs", 7, 5),))
    load = LoadView(running=2, waiting=3, deferred=1, blocks=10, free_blocks=4, grafts=("g1",))
    console = Console(width=200)
    with console.capture() as captured:
        console.print(shown(view(replace(snapshot, backbones={"b": sized}), {"r": load}, at=9.0)))
    return captured.get()


def test_the_screen_says_who_holds_what_and_why_a_job_waits() -> None:
    job = make_job("a", reason=Reason.PACK_MEMORY)
    text = printed(jobs=(job,), packs=(make_pack(),), replicas=(make_replica("r"), make_replica("s")))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "pack-p b open n/cpu0 0.0 0" in lines
    assert "r b n/cpu0 0.0 2 3 1 60%" in lines and "s b n/cpu0 0.0 not connected" in lines
    assert "g1 r" in lines and "b no pack.max_jobs 5 7" in lines
    assert any(line.startswith("ftjob-a t b ") and line.endswith("pack memory is taken") for line in lines)
    assert any(line.startswith("n/cpu0 2 0.0 0.0 100 pack-p") for line in lines)


def test_what_there_is_none_of_is_said() -> None:
    text = printed(devices=0)
    assert all(f"no {what}" in text for what in ("devices", "packs", "replicas", "waiting jobs"))
