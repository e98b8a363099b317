"""Everything that only a GPU can show, in one run of under eight minutes.

python benchmarks/gpu.py OUT [--dry] [--only PART ...] [--minutes M]

Each part is a process with a time of its own; what it finds is in OUT/parts as soon as it is found, and in OUT/gpu.json
with the machine, versions, commit and claims. Parts that compare run beside each other, those that time one after the
other. A part that fails or is late is said to have, and the others go on. With --dry all parts run here, on the fake
device of the tests: their code, and no number. Exits with 1 where a part failed or a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import machine
from rich.console import Console
from rich.table import Table
from tests_folder import tests_of

MINUTES = 7.5
_GRACE_S = 10.0  # for a part to come to its end after its time
_PACKAGES = ("triton", "bitsandbytes", "nvidia-cublas-cu12", "nvidia-cudnn-cu12")


@dataclass(frozen=True, slots=True)
class Part:
    """`seconds` of its own, of a run of `MINUTES`; `timed` ones have the machine for themselves."""

    name: str
    about: str
    seconds: float
    timed: bool = True


SHARES = 4  # processes that share the kernels' checks: compiling takes most of their time
PARTS = (
    *(Part(f"checks-{i}", "our programs against their references", 110, timed=False) for i in range(SHARES)),
    Part("packed", "jobs packed and alone, and on the CPU", 110, timed=False),
    Part("mixed", "streams mixed and alone, and on the CPU", 110, timed=False),
    Part("nf4", "a backbone in NF4 beside bitsandbytes", 80, timed=False),
    Part("peft", "logits beside PEFT's", 60, timed=False),
    Part("benches", "the ops' bench cases in bf16: errors and times", 45),
    Part("serving", "the engine beside transformers and PEFT", 95),
    Part("training", "the pack beside PEFT", 85),
    Part("traces", "profiler traces of decoding and training steps", 35),
    Part("memory", "peaks of a step, method by method", 25),
    Part("graph", "a CUDA graph of a decoding step", 20),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--dry", action="store_true", help="on the fake device, without any number")
    parser.add_argument("--only", nargs="*", metavar="PART", choices=[part.name for part in PARTS])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of the whole run")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what this script starts itself as
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not given.dry and not _there():
        print("no CUDA device: run this where torch sees a GPU, or with --dry for the code alone", file=sys.stderr)
        return 2
    (given.out / "parts").mkdir(parents=True, exist_ok=True)
    if given.part:
        carry_out(given.part, given.out, given.files, given.seconds, dry=False)
        return 0
    chosen = [part for part in PARTS if not given.only or part.name in given.only]
    with tempfile.TemporaryDirectory(prefix="polygraft-gpu-") as files:
        if given.dry:
            states = _dry(chosen, given.out, Path(files))
        else:
            states = _parts(chosen, given.out, Path(files), 60 * given.minutes)
    record = _merged(chosen, states, given.out, dry=given.dry)
    _show(record)
    return 0 if record["holds"] else 1


def carry_out(name: str, out: Path, files: Path, seconds: float, *, dry: bool) -> None:
    """One part, here."""
    import torch
    from gpu_card import Card
    from gpu_findings import Findings

    card = Card(torch.device("cuda", 0), not dry)
    findings = Findings(out / "parts" / f"{name}.json", seconds, dry)
    with findings.item(name):
        _body(name, out)(card, findings, files)


def _body(name: str, out: Path) -> Callable[..., None]:
    """The part's function of a card, findings and a folder for files."""
    if name.startswith("checks-"):
        share = int(name.removeprefix("checks-"))
        checks = import_module("gpu_kernels").checks
        return lambda card, findings, _: checks(card, findings, share, SHARES)
    if name == "benches":
        return lambda card, findings, _: import_module("gpu_kernels").benches(card, findings)
    if name == "traces":
        return partial(import_module("gpu_profile").traces, out=out)
    module = {"memory": "gpu_profile", "graph": "gpu_profile", "serving": "gpu_speed", "training": "gpu_speed"}
    body: Callable[..., None] = getattr(import_module(module.get(name, "gpu_equal")), name)
    return body


def _there() -> bool:
    import torch

    return torch.cuda.is_available()


def _parts(chosen: Sequence[Part], out: Path, files: Path, seconds: float) -> Mapping[str, str]:
    """Each part's state: done, or how it ended. `seconds` are those of all; what is over is not begun."""
    end, states = time.monotonic() + seconds, {}
    for group in ([part for part in chosen if not part.timed], *([part] for part in chosen if part.timed)):
        began = [(part, _start(part, out, files, end)) for part in group]
        for part, process in began:
            states[part.name] = _end(part, process, end)
            print(f"{part.name}: {states[part.name]}", file=sys.stderr, flush=True)
        _merged(chosen, states, out, dry=False)
    return states


def _start(part: Part, out: Path, files: Path, end: float) -> subprocess.Popen[bytes] | None:
    left = min(part.seconds, end - time.monotonic() - _GRACE_S)
    if left <= 0:
        return None
    log = (out / "parts" / f"{part.name}.log").open("wb")
    with log:
        command = [sys.executable, __file__, str(out), "--part", part.name, "--seconds", f"{left:.0f}"]
        return subprocess.Popen([*command, "--files", str(files)], stdout=log, stderr=subprocess.STDOUT)


def _end(part: Part, process: subprocess.Popen[bytes] | None, end: float) -> str:
    if process is None:
        return "not begun: the run's time was over"
    try:
        code = process.wait(max(1.0, min(part.seconds + _GRACE_S, end - time.monotonic())))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"stopped after its {part.seconds:.0f} s"
    return "done" if code == 0 else f"ended with {code}"


def _dry(chosen: Iterable[Part], out: Path, files: Path) -> Mapping[str, str]:
    tests_of(machine.ROOT)
    fake_gpu = import_module("tests.fake_gpu").fake_gpu
    states = {}
    with ExitStack() as stack:
        stack.enter_context(fake_gpu())
        for part in chosen:
            carry_out(part.name, out, files, part.seconds, dry=True)
            states[part.name] = "done"
    return states


def _merged(chosen: Sequence[Part], states: Mapping[str, str], out: Path, *, dry: bool) -> Mapping[str, Any]:
    """gpu.json: what all parts have found so far."""
    import torch
    from gpu_card import Card, describe

    parts: dict[str, Mapping[str, Any]] = {}
    for part in chosen:
        path = out / "parts" / f"{part.name}.json"
        found = json.loads(path.read_text()) if path.exists() else {"failed": {}, "claims": []}
        parts[part.name] = {"about": part.about, "state": states.get(part.name, "not begun"), **found}
    claims = [claim for part in parts.values() for claim in part["claims"]]
    failed = [name for name, part in parts.items() if part["failed"] or part["state"] != "done"]
    record = {
        "benchmark": "gpu",
        "dry": dry,
        "machine": asdict(machine.describe()),
        "gpu": describe(Card(torch.device("cuda", 0), not dry)),
        "versions": {**machine.versions(), **machine.versions_of(_PACKAGES)},
        "commit": machine.commit(),
        "sources": machine.sources(),
        "holds": not failed and all(claim["holds"] is not False for claim in claims),
        "claims": claims,
        "parts": parts,
    }
    (out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def _show(record: Mapping[str, Any]) -> None:
    console = Console(width=150)
    table = Table(title=f"{record['gpu']['name']}" + (" (dry: no numbers)" if record["dry"] else ""))
    for column in ("part", "what", "state", "seconds", "failed", "left out"):
        table.add_column(column, overflow="fold")
    for name, part in record["parts"].items():
        failed, left = (", ".join(part.get(kind, {})) for kind in ("failed", "left_out"))
        table.add_row(name, part["about"], part["state"], str(part.get("seconds", "")), failed, left)
    console.print(table)
    claims = Table(title="claims")
    for column in ("id", "value", "unit", "goal", "holds"):
        claims.add_column(column, overflow="fold")
    for claim in record["claims"]:
        value = "" if claim["value"] is None else f"{claim['value']:.3g}"
        goal = "" if claim["op"] is None else f"{claim['op']} {claim['goal']:g}"
        claims.add_row(claim["id"], value, claim["unit"], goal, {True: "yes", False: "no", None: ""}[claim["holds"]])
    console.print(claims)


if __name__ == "__main__":
    sys.exit(main())
