"""The Train run of a pack: what it starts, and what is said where Ray has no room for its processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from polygraft.trainers.plan import PackPlan
from polygraft.trainers.run import trainer, wanting

PLAN = PackPlan(
    pack="pack-1", nodes=("n",), kind="cpu", cores=1, backbone_folder="/b", store_url="memory://", data="/data"
)


def test_it_names_what_each_node_lacks() -> None:
    there = {"n": {"device": 2.0}, "m": {"device": 1.0}}
    said = wanting(replace(PLAN, nodes=("n", "n")), there, {"n": {"device": 0.5}})
    assert said.endswith("node n has 0.5 of 2 device free, and 1 is asked for")
    said = wanting(replace(PLAN, nodes=("n", "m")), there, {"n": {"device": 1.5}})
    assert "node n has 1.5 of 2 device free, and 0.5 is asked for; node m has 0 of 1 device free" in said


def test_it_names_a_node_that_is_gone() -> None:
    assert wanting(PLAN, {"m": {"device": 1.0}}, {}).endswith("node n is gone")


def test_of_a_node_with_gpus_it_counts_these() -> None:
    said = wanting(replace(PLAN, kind="cuda"), {"n": {"device": 1.0, "GPU": 4.0}}, {"n": {"GPU": 0.25}})
    assert said.endswith("node n has 0.25 of 4 GPU free, and 0.5 is asked for")


def test_a_run_starts_no_process_for_what_polygraft_does_by_itself_or_never(tmp_path: Path) -> None:
    """A reader of Ray's datasets, and one that gives back a dead pack's room."""
    kinds = {type(one).__name__ for one in trainer(PLAN, tmp_path)._create_default_callbacks()}
    assert "Starting" in kinds and not kinds & {"DatasetsCallback", "PlacementGroupCleanerCallback"}
