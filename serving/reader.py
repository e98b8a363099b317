"""Reads grafts made elsewhere, in a process of its own: a hostile folder can end it, and nothing else.

`serving/adoption.py` runs it: `python -m polygraft.serving.reader BACKBONE_FOLDER MEMORY_BYTES [QUANTISE]`. A line on
the standard input is a folder and where to save its graft, as a JSON list; the answer is a line on the standard output:
a `Saved`, or why there is none.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex

from polygraft.grafts.formats import native
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.formats.read import read
from polygraft.grafts.runtime.pretrained import fingerprint
from polygraft.grafts.spec import SpecError

_LOG = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(backbone: Path, memory_bytes: int, quantise: str | None) -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    backbone_files, of = BackboneFiles(backbone), fingerprint(backbone, quantise)
    _limit_memory(memory_bytes)
    for line in sys.stdin:
        folder, root = map(Path, json.loads(line))
        answers.write(json.dumps(_answer(folder, root, backbone_files, of)) + "\n")
        answers.flush()


def _answer(folder: Path, root: Path, backbone_files: BackboneFiles, of: str) -> Mapping[str, str | int]:
    try:
        graft, values = read(folder, backbone_files, of)
    except (FormatError, SpecError) as error:
        return {"refused": str(error)}
    except Exception:
        # Whatever it raises, the folder did it; why is for the log, since it may name files of this machine.
        reference = f"import-{token_hex(8)}"
        _LOG.exception("%s: %s could not be read", reference, folder)
        return {"refused": f"the graft could not be read; the service's log says why under {reference}"}
    try:
        identity = native.save(root, graft, values, backbone=of, backbone_files=backbone_files)
    except FormatError as error:
        return {"refused": str(error)}
    except OSError as error:
        _LOG.exception("a graft could not be saved")
        return {"failed": "full" if error.errno in _FULL else "not saved"}
    return {
        "graft": identity,
        "method": graft.spec.method,
        "fingerprint": of,
        "parameters": graft.parameters,
        "context_length": graft.context_length,
        "bytes": native.size(root / identity),
    }


def _limit_memory(more: int) -> None:
    """Let this process map `more` bytes beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
