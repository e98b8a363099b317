"""A claim needs every arm, every round and its worse bound; and nothing is timed while the gate is red."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from harness import Arm, ArmFailed, Running, Study, measure
from machine import Machine
from measure import Goal, all_hold, decide, interval, ratios
from record import Check, Gate, Head, Outcome, Record

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SPEED = Goal("speed", "speed", "ours", ("a", "b"), ">=", 1.5)
MEMORY = Goal("memory", "memory", "ours", ("a",), "<", 1.0)
SHARE = Goal("share", "speed", "ours", ("limit",))
ARMS = (
    Arm("ours", "", ("auto",)),
    Arm("a", "", ("bf16", "fp32")),
    Arm("b", "", ("bf16",)),
    Arm("limit", "", ("auto",), limit=True),
)
STUDY = Study(ARMS, (SPEED, MEMORY, SHARE), rounds=3)
GREEN, RED = Gate((Check("equal", 0.5, 1.0),)), Gate((Check("equal", 2.0, 1.0),))
MACHINE = Machine("cpu", 2, 1, "os", True)
HEAD = Head("b", False, 3, {"jobs": 8}, {"ours": "one pack"}, MACHINE, {"torch": "2"}, "c", "s")


@dataclass
class Lab:
    """A stage whose arms have fixed figures, and the order in which they were asked for anything."""

    gate: Gate = GREEN
    speeds: dict[tuple[str, str], float] = field(
        default_factory=lambda: {
            ("ours", "auto"): 300.0,
            ("a", "bf16"): 100.0,
            ("a", "fp32"): 150.0,
            ("b", "bf16"): 120.0,
            ("limit", "auto"): 600.0,
        }
    )
    memory: dict[str, int] = field(default_factory=lambda: {"ours": 10, "a": 20, "b": 30})
    fails: Callable[[str, int], bool] = lambda name, rounds: False
    asked: list[str] = field(default_factory=list)
    open_now: set[str] = field(default_factory=set)

    def check(self) -> Gate:
        self.asked.append("gate")
        return self.gate

    def open(self, arm: Arm, variant: str) -> Running:
        return Fake(self, arm.name, variant)


@dataclass
class Fake:
    lab: Lab
    name: str
    variant: str
    rounds: int = 0

    def __post_init__(self) -> None:
        self.lab.open_now.add(self.name)

    def load(self) -> str:
        return self.variant

    def warm(self) -> None:
        self.lab.asked.append(f"warm {self.name}")

    def round(self) -> float:
        alone = self.lab.open_now == {self.name}
        self.lab.asked.append(f"{self.name} {self.variant}" + (" alone" if alone else ""))
        self.rounds += 1
        if self.lab.fails(self.name, self.rounds):
            raise ArmFailed("no memory")
        return self.lab.speeds[self.name, self.variant]

    def pss(self) -> int:
        assert self.lab.open_now == {self.name}, "memory was read beside another arm's processes"
        return self.lab.memory[self.name]

    def close(self) -> None:
        self.lab.open_now.discard(self.name)


def run(lab: Lab, record: Record, study: Study = STUDY) -> bool:
    return measure(study, lab, record, lambda _: None)


def test_the_interval_is_the_median_and_what_its_resamples_keep() -> None:
    assert interval([2.0]).low == interval([2.0]).high == 2.0
    found = interval([1.0, 2.0, 3.0, 4.0, 100.0])
    # The median of five draws is the least value with probability 0.058 and the greatest with as much, above 5%.
    assert (found.median, found.low, found.high) == (3.0, 1.0, 100.0)
    many = interval([float(x) for x in range(101)])
    assert many.median == 50.0 and 40.0 < many.low < 45.0 and 55.0 < many.high < 60.0
    assert interval([3.0, 1.0, 2.0]) == interval([3.0, 1.0, 2.0])


def test_ratios_are_taken_round_by_round_and_only_from_whole_runs() -> None:
    # A machine that is twice as slow in the second round changes no ratio.
    samples = [{"ours": 300.0, "a": 100.0}, {"ours": 150.0, "a": 50.0}]
    assert ratios(samples, "ours", "a") == (3.0, 3.0)
    assert ratios([*samples, {"ours": 300.0}], "ours", "a") == ()
    assert ratios([], "ours", "a") == ()


def test_a_claim_is_against_the_strongest_rival_and_holds_on_its_worse_bound() -> None:
    samples = [{"ours": 160.0, "a": 100.0, "b": 10.0} for _ in range(5)]
    claim = decide(SPEED, samples)
    assert (claim.value, claim.low, claim.against, claim.holds) == (1.6, 1.6, "a", True)
    samples[2] = {"ours": 140.0, "a": 100.0, "b": 10.0}  # with five rounds one below the goal is too many
    claim = decide(SPEED, samples)
    assert (claim.value, claim.low, claim.against, claim.holds) == (1.6, 1.4, "a", False)


def test_less_is_claimed_on_the_upper_bound() -> None:
    assert decide(MEMORY, [{"ours": 9.0, "a": 10.0}]).holds
    assert decide(MEMORY, [{"ours": 10.0, "a": 10.0}]).holds is False
    two = Goal("memory", "memory", "ours", ("a", "b"), "<", 1.0)
    assert decide(two, [{"ours": 9.0, "a": 10.0, "b": 8.0}]).against == "b"


def test_of_goals_with_one_id_either_must_hold_and_others_beside_it() -> None:
    def holds(ours: float, a: float, limit: float, memory: float = 9.0) -> bool:
        speed = {"ours": ours, "a": a, "limit": limit}
        either = (
            Goal("speed", "speed", "ours", (rival,), ">=", least) for rival, least in (("a", 2.2), ("limit", 0.6))
        )
        claims = [decide(goal, [speed]) for goal in either]
        return all_hold([*claims, decide(MEMORY, [{"ours": memory, "a": 10.0}])])

    assert holds(220.0, 100.0, 400.0) and holds(219.0, 100.0, 365.0)
    assert not holds(219.0, 100.0, 366.0)
    assert not holds(220.0, 100.0, 300.0, memory=10.0)


def told(program: str, expression: str) -> object:
    """By a program of the benchmarks, in a process of its own: here `material` and `serving` are others' names."""
    command = [sys.executable, "-c", f"import json, {program}; print(json.dumps({expression}))"]
    return json.loads(subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=True).stdout)


def test_training_is_to_be_so_much_faster_than_two_processes_or_so_near_to_the_products_in_less_memory() -> None:
    claimed = told("training", "[(one.id, one.rivals, one.op, one.goal) for one in training.GOALS if one.op]")
    assert claimed == [
        ["training.speed", ["peft_two_processes"], ">=", 2.2],
        ["training.speed", ["ceiling"], ">=", 0.6],
        ["training.memory", ["peft_two_processes"], "<", 1.0],
    ]


def test_what_grafts_must_cost_is_estimated_by_the_bytes_of_weights_that_a_step_reads() -> None:
    """SmolLM2's linears and its head once, and A and B of eight grafts, in bf16."""
    a_layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    ranks = 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    bare = 2 * (30 * a_layer + 576 * 49152)
    read = {"ours": bare + 8 * 2 * 30 * ranks, "ours_bare": bare}
    assert told("serving", "serving.READ") == read
    record, goal = Record(HEAD, None), Goal("estimate", "bytes read", "ours_bare", ("ours",))
    assert run(Lab(), record, replace(STUDY, goals=(goal,), read=read))
    (figure,) = record.figures
    assert figure.value == pytest.approx(0.775, abs=5e-4) and figure.holds is None


def test_a_missing_rival_is_not_measured_never_a_pass() -> None:
    claim = decide(SPEED, [{"ours": 300.0, "a": 100.0}])
    assert claim.value is None and claim.holds is None
    assert decide(SHARE, [{"ours": 300.0, "limit": 600.0}]).holds is None  # reported, not claimed


def test_arms_are_measured_alone_and_then_in_turn(tmp_path: Path) -> None:
    lab = Lab()
    record = Record(HEAD, tmp_path / "run.json")
    assert run(lab, record)
    alone = [line for line in lab.asked if line.endswith("alone")]
    assert alone == ["ours auto alone", "a bf16 alone", "a fp32 alone", "b bf16 alone", "limit auto alone"]
    assert lab.asked[-12:] == ["ours auto", "a fp32", "b bf16", "limit auto"] * 3
    assert record.arms["a"] == Outcome("fp32", "fp32", {"bf16": 100.0, "fp32": 150.0}, 20, 20)
    assert record.arms["limit"].peak_bytes == 0
    speed, memory = record.claims
    assert (speed.value, speed.against, speed.holds) == (2.0, "a", True)
    assert (memory.value, memory.holds) == (0.5, True)
    assert [figure.value for figure in record.figures] == [0.5]
    assert not lab.open_now


def test_the_record_has_the_fields_that_its_readers_want(tmp_path: Path) -> None:
    run(Lab(), Record(HEAD, tmp_path / "run.json"))
    data = json.loads((tmp_path / "run.json").read_text())
    assert {"machine", "versions", "commit", "arms", "samples", "claims"} <= data.keys()
    assert {"id", "value", "unit", "goal", "op", "holds"} <= data["claims"][0].keys()
    assert len(data["samples"]) == 3 and data["gate"]["holds"] is True


@pytest.mark.parametrize("gate", [RED, Gate(()), Gate((Check("equal", float("nan"), 1.0),))])
def test_on_a_red_gate_nothing_is_timed_and_nothing_claimed(tmp_path: Path, gate: Gate) -> None:
    lab, record = Lab(gate=gate), Record(HEAD, tmp_path / "run.json")
    assert not run(lab, record)
    assert lab.asked == ["gate"]
    assert [claim.holds for claim in record.claims] == [None, None]
    green = Lab()  # the gate is asked again, since a record never stays red
    assert run(green, Record.resume(HEAD, tmp_path / "run.json"))


def test_a_gate_that_cannot_be_checked_is_red(tmp_path: Path) -> None:
    class NoPeft(Lab):
        def check(self) -> Gate:
            raise ArmFailed("No module named 'peft'")

    lab, record = NoPeft(), Record(HEAD, None)
    assert not run(lab, record) and lab.asked == []


def test_an_arm_that_fails_is_out_and_its_claims_are_not_measured(tmp_path: Path) -> None:
    lab = Lab(fails=lambda name, rounds: name == "b" and rounds == 2)
    record = Record(HEAD, tmp_path / "run.json")
    assert not run(lab, record)
    assert record.arms["b"].missing == "no memory"
    assert [claim.holds for claim in record.claims] == [None, True]
    assert [sorted(sample) for sample in record.samples] == [["a", "b", "limit", "ours"]] + [["a", "limit", "ours"]] * 2
    assert not lab.open_now


def test_a_run_that_was_cut_goes_on_from_its_record(tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def cut(name: str, rounds: int) -> bool:
        if name == "a" and rounds == 3:
            raise Cut
        return False

    path = tmp_path / "run.json"
    with pytest.raises(Cut):
        run(Lab(fails=cut), Record(HEAD, path))
    lab, record = Lab(), Record.resume(HEAD, path)
    assert len(record.samples) == 2  # the round that was cut in the middle is done again
    assert run(lab, record)
    assert lab.asked == ["warm ours", "warm a", "warm b", "warm limit", "ours auto", "a fp32", "b bf16", "limit auto"]
    again = Lab()
    assert run(again, Record.resume(HEAD, path)) and again.asked == []


def test_samples_of_another_commit_machine_or_plan_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    run(Lab(), Record(HEAD, path))
    for head in (replace(HEAD, sources="t"), replace(HEAD, quick=True), replace(HEAD, shapes={"jobs": 4})):
        assert Record.resume(head, path).samples == []
    assert len(Record.resume(HEAD, path).samples) == 3


def test_a_file_that_is_no_record_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("notes")
    with pytest.raises(SystemExit, match="move it away"):
        Record.resume(HEAD, path)
    assert path.read_text() == "notes"
