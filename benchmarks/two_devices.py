"""What one machine does as one device and as two, without any floor under its steps: tokens that jobs train on and that
streams are given, a second. It claims nothing: two devices share the cores that one has whole.

two_devices.py [--quick] [--json PATH]: prints a line a figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
from figures import conclude
from front_cpu import streams
from harness import ArmFailed
from measure import Claim
from over_http_servers import MODEL, Ours
from program import end_when_told

from polygraft.launch.corpus import load

JOBS, EPOCHS, QUICK_ROWS = 8, 3, 16
STREAMS, SECONDS, QUICK_SECONDS = 32, 60.0, 10.0
_UNTIL_S = 1800.0


def train(server: Ours, epochs: int, most: int | None) -> None:
    """Submit as many jobs as there are, half of them to a pack, each over at most `most` examples, and wait until all
    are over. Raises ArmFailed."""
    headers = {"Authorization": f"Bearer {server.key}"}
    with httpx.Client(base_url=f"{server.url}/v1", headers=headers, timeout=120) as client:
        jobs = []
        for number, tenant in enumerate(load().tenants[:JOBS]):
            lines = b"".join(tenant.train_jsonl.splitlines(keepends=True)[:most])
            files = {"file": (f"{number}.jsonl", lines)}
            file = client.post("/files", files=files, data={"purpose": "fine-tune"}).raise_for_status().json()["id"]
            method = {
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": epochs, "peft": "lora(r=8)"}},
            }
            asked = {"model": MODEL, "training_file": file, "suffix": f"job-{number}", "method": method}
            jobs.append(client.post("/fine_tuning/jobs", json=asked).raise_for_status().json()["id"])
        until = time.monotonic() + _UNTIL_S
        while time.monotonic() < until:
            found = [client.get(f"/fine_tuning/jobs/{job}").raise_for_status().json()["status"] for job in jobs]
            if set(found) == {"succeeded"}:
                return
            if "failed" in found:
                raise ArmFailed(f"jobs: {found}")
            time.sleep(1)
    raise ArmFailed(f"the jobs took more than {_UNTIL_S:.0f} s")


def trained(home: Path) -> tuple[float, int]:
    """Rows that packs trained on, a second from the first step to the last, by their step logs; and how many packs."""
    logs = [path.read_text().splitlines() for path in (home / "data" / "packs").glob("*/steps.jsonl")]
    steps = [json.loads(line) for log in logs for line in log]
    begun = min(step["time"] - step["seconds"] for step in steps)
    return sum(step["rows"] for step in steps) / (max(step["time"] for step in steps) - begun), len(logs)


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def measured(folder: Path, devices: int, *, quick: bool) -> Iterator[Claim]:
    home = folder / f"{devices}"
    settings = {
        "POLYGRAFT_PACK__MAX_JOBS": f"{JOBS // 2}",
        "POLYGRAFT_PACK__OPENING_S": "1",
        "POLYGRAFT_SERVE__MIN_REPLICAS": f"{devices}",
    }
    with closing(Ours(home, options=["--devices", f"{devices}"], settings=settings)) as server:
        seconds = QUICK_SECONDS if quick else SECONDS
        asyncio.run(streams(server, STREAMS, seconds / 4))
        say(f"devices {devices}: streams")
        tokens = asyncio.run(streams(server, STREAMS, seconds))
        say(f"devices {devices}: {tokens / seconds:.1f} tokens/s; jobs")
        train(server, 1 if quick else EPOCHS, QUICK_ROWS if quick else None)
        rows, packs = trained(home)
        say(f"devices {devices}: {rows:.1f} rows/s in {packs} packs")
    yield Claim(f"devices_{devices}.served", tokens / seconds, "tokens/s", None, None, None)
    yield Claim(f"devices_{devices}.trained", rows, "rows/s", None, None, None)
    yield Claim(f"devices_{devices}.packs", float(packs), "packs", None, None, None)


def main() -> int:
    parser = argparse.ArgumentParser(prog="two_devices.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shows that it works, proves nothing")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    end_when_told()
    with tempfile.TemporaryDirectory(prefix="polygraft-bench-") as folder:
        claims = [one for devices in (1, 2) for one in measured(Path(folder), devices, quick=given.quick)]
    return conclude("two_devices", claims, quick=given.quick, json_path=given.json)


if __name__ == "__main__":
    sys.exit(main())
