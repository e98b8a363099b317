"""docs/methods.md and a page for every method in docs/methods/: what each is, from the registry, which equalities have
a test, from the tests (equalities.py), and how far it is from its oracle, measured here.

python -m tests.grafts.page measures, and writes docs/methods.json and the pages.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch

from polygraft.grafts.catalogue import Entry, entry, fingerprint
from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.description import Description, describe
from polygraft.grafts.methods.refused import table
from polygraft.grafts.methods.registry import find, layouts, methods
from polygraft.grafts.runtime.backbone import Backbone
from tests.grafts.equalities import shown
from tests.grafts.oracle.row import relative
from tests.grafts.oracle.table import ALL
from tests.grafts.test_methods import batch, judged, ours
from tests.tiny import tiny_llama

DOCS = Path(__file__).parents[2] / "docs"
# Published after the survey, or not in its tables.
NEWER = frozenset(
    [
        "adamss",
        "bat",
        "bdlora",
        "beft",
        "boft",
        "c3a",
        "corda",
        "cpt",
        "deft",
        "delora",
        "direft",
        "eva",
        "fourierft",
        "frod",
        "glora",
        "gralora",
        "hira",
        "hra",
        "hydralora",
        "loha",
        "lokr",
        "from",
        "lora-ga",
        "lora-xs",
        "meteora",
        "mica",
        "milora",
        "miss",
        "noreft",
        "o-lora",
        "oft",
        "olora",
        "orthogonal",
        "para",
        "peanut",
        "pissa",
        "psoft",
        "pvera",
        "randlora",
        "road",
        "rslora",
        "shira",
        "supertuning",
        "tinylora",
        "unilora",
        "vblora",
        "waveft",
    ]
)
# Of papers whose text could not be read here none of their equations is cited rather than a wrong one. What could be
# read is PEFT 0.21's code, a file under peft/tuners, or a section of the survey.
_IN_PEFT = {
    "bat": "miss/layer.py",
    "bdlora": "lora/variants.py",
    "cpt": "cpt/model.py",
    "deft": "deft/layer.py",
    "frod": "frod/layer.py",
    "glora": "glora/layer.py",
    "mica": "lora/layer.py",
    "para": "deft/layer.py",
    "peanut": "peanut/layer.py",
    "pvera": "pvera/layer.py",
    "supertuning": "supertuning/layer.py",
    "unilora": "unilora/layer.py",
}
_IN_SURVEY = {
    "fishmask": "III-B",
    "idpg": "III-A2",
    "kadaptation": "III-C",
    "krona": "III-C",
    "propetl": "IV-B",
    "smop": "III-A2",
    "sparse-adapter": "IV-B",
}
UNREAD: Mapping[str, str] = {
    **{name: f"as PEFT 0.21 has it (`{file}`)" for name, file in _IN_PEFT.items()},
    **{name: f"described in the survey's section {part} (arXiv 2403.14608)" for name, part in _IN_SURVEY.items()},
    "capaboost": "neither PEFT's code nor the survey states it",
    "molora": "neither PEFT's code nor the survey states it; with `top` it is MoLA's eq. 3 and 4 (arXiv 2402.08562)",
}

# Of papers that were read: those that number no equation of the method.
_NUMBERLESS = (
    "adapter-drop cartridge diff-pruning eva from fusion ia3 loha lora-plus mam parallel pfeiffer prefix-mlp prompt"
    " scaled-parallel serial shira spot tinylora unipelt unipelt-al"
)
NUMBERLESS = frozenset(_NUMBERLESS.split())

# Numbered equations of the survey (arXiv 2403.14608, sections III-A to III-C) that state a method, or what it changes,
# where no equation of its own paper is quoted.
_ADAPTERS = "adapter-drop averaged-adapters binary-adapter fusion hypernet-adapter pfeiffer propetl"
_PROMPTS = "cpt dept dpt idpg ipt lpt mpt smop spot"
_MASKS = "child-tuning diff-pruning fishmask lt-sft moved-rows moving-mask pafi s-bitfit shira"
_LORAS = "eva lora-fa lora-plus olora orthogonal rslora"
SURVEY: Mapping[str, str] = {
    **dict.fromkeys((*_ADAPTERS.split(), "sparse-adapter"), "eq. 7, of adapters"),
    **dict.fromkeys(_PROMPTS.split(), "eq. 8, of soft prompts"),
    **dict.fromkeys(_MASKS.split(), "eq. 11, of a mask over the weights"),
    **dict.fromkeys(_LORAS.split(), "eq. 12, of LoRA"),
    "hiwi": "eq. 15",
    "ia3": "eqs. 9 and 10",
    "job-gated-experts": "eq. 12, of LoRA",
    "ln-tuning": "eq. 11, with a mask that selects the norms",
    "prompt": "eq. 8",
    "serial": "eq. 7",
    "sora": "eq. 14",
    "spt": "eqs. 11, of a mask over the weights, and 12, of LoRA",
}


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


def pages(measured: Mapping[str, Measured]) -> Mapping[str, str]:
    """Every page by its place in docs/."""
    entries = {name: entry(method) for name, method in methods().items()}
    own = {f"methods/{name}.md": own_page(methods()[name], line, measured[name]) for name, line in entries.items()}
    return {"methods.md": index([*entries.values()], measured), **own}


def index(entries: Sequence[Entry], measured: Mapping[str, Measured]) -> str:
    """The page of all methods."""
    whole = " and ".join(f"`{e.name}`" for e in entries if not e.chunkable)
    ends = ", ".join(f"`{e.name}`" for e in entries if e.chunkable and e.recompute_needs_prompt_len)
    prints = {fingerprint(method) for method in methods().values()}
    lines = [
        "# Methods",
        "",
        f"{len(entries)} methods in {len(prints)} distinct fingerprints (op, tap, activation, form, start, frozen,",
        "hooks; sizes and aliases do not count), written by `make methods` from the registry and the tests. A method's",
        "page says what it does, how it differs from its paper, when to choose it and what is tested.",
        "",
        "Parameters are the trainable ones of the defaults on Llama 7B. *Merges* says whether the graft folds into W.",
        "*Error* is the largest relative L2 distance of logits and gradients from the oracle in float64, on a tiny",
        "random Llama: PEFT 0.21 where it has the method, else the paper's equation as hooks on transformers' model.",
        "*Packed* says whether a test holds packed training to the bits of training alone on a CPU, *mixed* decoding",
        "in company to the oracle alone (1e-5 in float32), *merged* the folded weights to the graft beside them (1e-9",
        "in float64; where it merges).",
        "",
        "A prompt may be computed in pieces, and a token's keys depend on the graft and the tokens before it alone,",
        f"but for {whole}, whose virtual tokens read the whole prompt, and {ends},",
        "which edit its last tokens: in pieces too, but keys of theirs depend on where the prompt ends.",
        "",
        "| method | kind | what it does | parameters | merges | packed | mixed | merged | oracle | error |",
        "|---|---|---|---:|---|---|---|---|---|---:|",
    ]
    for e in entries:
        also = f" ({', '.join(e.aliases)})" if e.aliases else ""
        found = measured[e.name]
        tested = [_tested(kind, e) for kind in ("packed", "mixed", "merged")]
        cells = [
            f"[`{e.name}`](methods/{e.name}.md){also}",
            e.kind,
            _cell(e.summary),
            f"{e.parameters:,}",
            "yes" if e.mergeable else "no",
            *tested,
            found["oracle"],
            f"{max(found['logits'], found['gradients']):.0e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    refused = ["", "## What is not here under its name, and why", "", "Each is refused with its reason.", ""]
    return "\n".join([*lines, *refused, *table()]) + "\n"


def own_page(method: Method, line: Entry, measured: Measured) -> str:
    """The page of one method."""
    words = describe(method)
    usage = ", ".join(
        name if one.default is one.empty else f"{name}={one.default}" for name, one in method.arguments.items()
    )
    also = f", also called {' and '.join(f'`{alias}`' for alias in method.aliases)}" if method.aliases else ""
    kinds = [layout.kind for layout in layouts() if layout.method == method.name]
    facts = {
        "paper": _link(line.paper),
        "stated in": _stated(method, words),
        "declared in": f"`{'/'.join(method.slots.__module__.split('.')[1:])}.py`",
        "family (the survey's)": method.slots.__module__.split(".")[-2],
        "kind": line.kind,
        "slots": "; ".join(line.slots),
        "hooks": ", ".join(line.hooks),
        "trainable parameters on Llama 7B": f"{line.parameters:,}",
        "learning rate to start from": f"{method.learning_rate:g}",
        "folds into W": "yes" if line.mergeable else "no",
        "a prompt may be computed in pieces": "yes" if line.chunkable else "no",
        "keys and values need the prompt's length": "yes" if line.recompute_needs_prompt_len else "no",
        "PEFT's `peft_type`": ", ".join(dict.fromkeys(kinds)),
    }
    lines = [
        f"# {method.name}",
        "",
        words.summary,
        *(["", words.arguments] if words.arguments else []),
        "",
        f"Written `{method.name}({usage})` with its defaults{also}.",
        "",
        "## Deviations from the paper",
        "",
        _sentence(words.deviations),
        "",
        "## When to choose it",
        "",
        f"When {words.choose}",
        "",
        "## What follows from its slots",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items() if value),
        "",
        "## What is tested",
        "",
        "| equality | test | with |",
        "|---|---|---|",
        *(f"| {said} | {_cases(kind, line, measured)} |" for kind, said in _EQUALITIES.items()),
    ]
    return "\n".join(lines) + "\n"


_EQUALITIES = {
    "packed": "trained in company = alone, bit for bit on a CPU",
    "mixed": "decoded in company = the oracle alone, 1e-5",
    "merged": "folded into W = beside it, 1e-9",
    "oracle": "logits and gradients of the oracle",
}


def _cases(kind: str, line: Entry, measured: Measured) -> str:
    """The test, and the grafts that it shows the equality of."""
    if kind == "merged" and not line.mergeable:
        return "it does not fold |"
    found = shown()[kind].get(line.name, ())
    if not found:
        return "**no test** |"
    tests = ", ".join(f"`{test}`" for test in dict.fromkeys(test for test, _ in found))
    texts = ", ".join(f"`{text.strip()}`" for text in dict.fromkeys(text for _, text in found))
    oracle = f" ({measured['oracle']}: {max(measured['logits'], measured['gradients']):.0e})" * (kind == "oracle")
    return f"{tests} | {_cell(texts)}{oracle}"


def _stated(method: Method, words: Description) -> str:
    """Where the paper states what the summary says, by the number of its equation; without one, that it has none or why
    none is quoted, and what is followed."""
    if any(one.startswith("eq.") for one in words.stated):
        return "; ".join(words.stated)
    if method.paper.startswith("PEFT"):
        followed = "PEFT's code; no paper"
    elif method.name in UNREAD:
        followed = f"equation number not verified; {UNREAD[method.name]}"
    elif method.name in NUMBERLESS:
        followed = f"{'; '.join(words.stated)}; the paper numbers no equation of it"
    else:
        followed = f"{'; '.join(words.stated)}; no numbered equation of the paper is quoted"
    survey = SURVEY.get(method.name)
    return f"{followed}; the survey's {survey}" if survey else followed


def _tested(kind: str, line: Entry) -> str:
    if kind == "merged" and not line.mergeable:
        return ""
    return "yes" if line.name in shown()[kind] else "**no**"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _link(paper: str) -> str:
    """A paper's address, where its name has one."""
    kind, _, name = paper.rpartition(" ")
    place = {
        "arXiv": "https://arxiv.org/abs/",
        "OpenReview": "https://openreview.net/forum?id=",
        "doi": "https://doi.org/",
        "ACL Anthology": "https://aclanthology.org/",
    }.get(kind)
    return paper if place is None else f"[{paper}]({place}{name})"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        backbone = Backbone.load(tiny_llama(Path(folder)), torch.float64)
        measured = {name: measure(backbone, name) for name in methods()}
    (DOCS / "methods.json").write_text(json.dumps(measured, indent=1) + "\n")
    written = pages(measured)
    (DOCS / "methods").mkdir(exist_ok=True)
    for stale in (DOCS / "methods").glob("*.md"):
        if f"methods/{stale.name}" not in written:
            stale.unlink()
    for place, text in written.items():
        (DOCS / place).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
