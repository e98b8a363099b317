"""Whether this tree computes what another commit did, bit for bit: losses, norms, tensors, tokens, logits, files.

python benchmarks/parity.py --against COMMIT [--quick] [--only PART ...] [--baseline FILE] [--except GLOB ...]
                            [--threads N] [--json PATH]

A probe (`parity_probe.py`) runs in a worktree of the commit and in this tree, and every digest that differs, or that
one side lacks, is named. `--baseline` keeps the commit's digests in a file and reads them there the next time, on the
same kind of machine. `--except` leaves out names that are meant to differ. Exits with 1 where something differs, with 2
where a probe failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path

from machine import describe, versions
from trees import ROOT, git, worktree

_SHOWN = 60  # names of one kind of difference that are printed; all of them are in the JSON
_NAMES = "parity_names.py"  # may change without making a kept baseline worthless

Digests = Mapping[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="COMMIT")
    parser.add_argument("--quick", action="store_true", help="fewer methods and architectures, under a minute")
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", help="parts of the probe, by their names")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="where the commit's digests are kept")
    parser.add_argument("--except", dest="left_out", action="append", default=[], metavar="GLOB")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on both sides")
    parser.add_argument("--json", type=Path, metavar="PATH")
    given = parser.parse_args()
    asked = ["--threads", str(given.threads), *(["--quick"] if given.quick else [])]
    asked += ["--only", *given.only] if given.only else []
    commit = git("rev-parse", given.against)
    with ThreadPoolExecutor(2) as both:
        old = both.submit(_kept, given.baseline, commit, asked)
        new = both.submit(probe, ROOT, asked)
        before, after = old.result(), new.result()
    keep = [name for name in {**before, **after} if not any(fnmatchcase(name, glob) for glob in given.left_out)]
    found = differences({n: before[n] for n in keep if n in before}, {n: after[n] for n in keep if n in after})
    report(found, len(keep))
    if given.json:
        said = {"against": commit, "commit": git("rev-parse", "HEAD"), "asked": asked, "compared": len(keep)}
        given.json.write_text(json.dumps({**said, "machine": _machine(), **found}, indent=1))
    raise SystemExit(1 if any(found.values()) else 0)


def differences(before: Digests, after: Digests) -> Mapping[str, Sequence[str]]:
    """Names whose digests differ, that one side lacks, and under which either side met an error."""
    return {
        "differ": [name for name in before if name in after and before[name] != after[name]],
        "missing": [name for name in before if name not in after],
        "new": [name for name in after if name not in before],
        "raised": [f"{name}: {side[name]}" for side in (before, after) for name in side if name.endswith("/raised")],
    }


def report(found: Mapping[str, Sequence[str]], compared: int) -> None:
    for kind, names in found.items():
        for name in names[:_SHOWN]:
            print(f"{kind}: {name}")
        if len(names) > _SHOWN:
            groups = Counter("/".join(name.split("/")[:3]) for name in names)
            print(f"{kind}: {len(names)} in all: " + ", ".join(f"{n} in {group}" for group, n in groups.most_common()))
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in found.items() if names)
    print(f"{compared} digests: {counts or 'all equal'}")


def probe(tree: Path, asked: Sequence[str]) -> Digests:
    """What a tree computes. Both sides run the same probe, this tree's."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "digests.json"
        command = [sys.executable, str(ROOT / "benchmarks/parity_probe.py"), str(tree), "--out", str(out), *asked]
        environment = {**os.environ, "PYTHONPATH": str(tree / ".types")}
        done = subprocess.run(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"the probe failed in {tree}:\n{done.stderr[-4000:]}", file=sys.stderr)
            os._exit(2)  # the other side's result is of no use
        read: Digests = json.loads(out.read_text())["digests"]
        return read


def _kept(baseline: Path | None, commit: str, asked: Sequence[str]) -> Digests:
    """The commit's digests, from the baseline's file if it is of the same probe, question and kind of machine."""
    about = {"commit": commit, "asked": list(asked), "machine": _machine(), "probe": _probe_digest()}
    if baseline and baseline.exists():
        read = json.loads(baseline.read_text())
        if read["about"] == about:
            kept: Digests = read["digests"]
            return kept
        print(f"{baseline}: is of another probe, question or machine; made anew", file=sys.stderr)
    with worktree(commit) as tree:
        digests = probe(tree, asked)
    if baseline:
        draft = baseline.with_name(f".{baseline.name}.{os.getpid()}")
        draft.write_text(json.dumps({"about": about, "digests": digests}, indent=0))
        os.replace(draft, baseline)
    return digests


def _probe_digest() -> str:
    digest = sha256()
    for path in sorted((ROOT / "benchmarks").glob("parity_*")):
        if path.suffix in (".py", ".json") and path.name != _NAMES:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _machine() -> Mapping[str, object]:
    """What decides which arithmetic is taken."""
    machine = describe()
    return {"processor": machine.processor, "bf16": machine.bf16, **versions()}


if __name__ == "__main__":
    main()
