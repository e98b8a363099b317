"""docs/methods.md: what every method is, from the registry, and how far it is from its oracle, measured here.

python -m tests.grafts.page measures, and writes docs/methods.json and the page.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import torch

from polygraft.grafts.catalogue import entry, fingerprint
from polygraft.grafts.methods.refused import table
from polygraft.grafts.methods.registry import find, methods
from polygraft.grafts.runtime.backbone import Backbone
from tests.grafts.oracle.row import relative
from tests.grafts.oracle.table import ALL
from tests.grafts.test_methods import batch, judged, ours
from tests.tiny import tiny_llama

DOCS = Path(__file__).parents[2] / "docs"
# What no row shows, since it is not trained alone: `oracle` names the test that does.
ELSEWHERE: Mapping[str, str] = {
    "loftq": "tests/grafts/runtime/test_nf4.py",
    "mezo": "tests/trainers/test_mezo.py",
}
# Published after the survey, or not in its tables.
NEWER = frozenset(
    "adamss bat bdlora beft boft c3a corda cpt deft delora direft eva fourierft frod glora gralora hira hra hydralora "
    "loha lokr from lora-ga lora-xs meteora mica milora miss noreft o-lora oft olora orthogonal para peanut pissa "
    "psoft pvera randlora road rslora shira supertuning tinylora unilora vblora waveft".split()
)


class Measured(TypedDict):
    """The largest relative error of logits and of a trained tensor's gradient in float64, and the row's name."""

    row: str
    oracle: str
    logits: float
    gradients: float


def rows_of(method: str) -> list[str]:
    """The table's rows whose text has the method, those first in which it is alone."""
    names = {method, *find(method).aliases}
    found = [row for row, r in ALL.items() if names & set(re.findall(r"(?:^|\+)\s*([a-z][a-z0-9_-]*)", r.text))]
    return sorted(found, key=lambda row: "+" in ALL[row].text)


def measure(backbone: Backbone, method: str) -> Measured:
    """Compare the method's first row with its oracle."""
    name = rows_of(method)[0]
    row, (prompts, slopes) = ALL[name], batch(backbone)
    values = row.values(backbone.shape, seed=3)
    expected, wanted = judged(row.oracle(backbone.folder, values, backbone.dtype), prompts, slopes)
    logits, gradients = ours([(row, values)], backbone, prompts, slopes)
    return Measured(
        row=name,
        oracle="PEFT" if row.config is not None else "equation",
        logits=relative(logits, expected),
        gradients=max(relative(gradients[tensor], value) for tensor, value in wanted.items()),
    )


def page(measured: Mapping[str, Measured]) -> str:
    """The whole page."""
    entries = [entry(method) for method in methods().values()]
    whole = " and ".join(f"`{e.name}`" for e in entries if not e.chunkable)
    ends = ", ".join(f"`{e.name}`" for e in entries if e.chunkable and e.recompute_needs_prompt_len)
    prints = {fingerprint(method) for method in methods().values()}
    lines = [
        "# Methods",
        "",
        f"{len(entries)} methods in {len(prints)} distinct fingerprints (op, tap, activation, form, start, frozen,",
        "hooks; sizes and aliases do not count), written by `make methods` from the registry.",
        "",
        "Parameters are the trainable ones of the defaults on Llama 7B. *Merges* says whether the graft folds into W.",
        "*Error* is the largest relative L2 distance of logits and gradients from the oracle in float64, on a tiny",
        "random Llama: PEFT 0.21 where it has the method, else the paper's equation as hooks on transformers' model.",
        "",
        "A prompt may be computed in pieces, and a token's keys depend on the graft and the tokens before it alone,",
        f"but for {whole}, whose virtual tokens read the whole prompt, and {ends},",
        "which edit its last tokens: in pieces too, but keys of theirs depend on where the prompt ends.",
        "",
        "| method | family | what it does | slots | hooks | parameters | merges | oracle | error |",
        "|---|---|---|---|---|---:|---|---|---:|",
    ]
    for e in entries:
        found = measured.get(e.name)
        oracle = found["oracle"] if found else f"[test](../{ELSEWHERE[e.name]})"
        error = f"{max(found['logits'], found['gradients']):.0e}" if found else ""
        also = f" ({', '.join(e.aliases)})" if e.aliases else ""
        summary = e.summary.replace("|", "\\|")
        lines.append(
            f"| `{e.name}`{also} | {e.family} | {summary} [{e.paper}] | {'; '.join(e.slots)} | {', '.join(e.hooks)} "
            f"| {e.parameters:,} | {'yes' if e.mergeable else 'no'} | {oracle} | {error} |"
        )
    refused = ["", "## What is not here, and why", "", "Asked for by name, each is refused with its reason.", ""]
    return "\n".join([*lines, *refused, *table()]) + "\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        backbone = Backbone.load(tiny_llama(Path(folder)), torch.float64)
        measured = {name: measure(backbone, name) for name in methods() if name not in ELSEWHERE}
    (DOCS / "methods.json").write_text(json.dumps(measured, indent=1) + "\n")
    (DOCS / "methods.md").write_text(page(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
