"""Tab-separated files as GLUE ships them, as JSONL: a first line with the names of the columns, no quoting."""

from __future__ import annotations

import json
from pathlib import Path

from polygraft.grafts.text.labelled import FIRST, KEYS, SECOND
from polygraft.launch.output import Failure, Status


def jsonl_of(path: Path) -> bytes:
    """The lines of a TSV file as labelled texts; of its columns those that such a text has. Raises Failure naming line
    and column."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise Failure(f"{path}: byte {error.start + 1} is not UTF-8", Status.USAGE) from None
    names = [name.strip() for name in lines[0].split("\t")] if lines else []
    read = [name for name in names if name in KEYS]
    if "label" not in read or not set(FIRST) & set(read):
        wanted = f"label and one of {', '.join(FIRST)} (and {' or '.join(SECOND)})"
        raise Failure(f"{path}: line 1 names the columns {', '.join(names) or 'none'}; it needs {wanted}", Status.USAGE)
    found = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != len(names):
            raise Failure(f"{path}: line {number} has {len(cells)} columns, the first one {len(names)}", Status.USAGE)
        row = dict(zip(names, cells, strict=True))
        found.append(json.dumps({name: row[name] for name in read}, ensure_ascii=False) + "\n")
    return "".join(found).encode()
