"""What would become of a folder, name or hub id as a backbone: checked, and its fingerprint taken.

The ingress has it done in a process (`examined`), since it needs torch and memory that the ingress has not: `python -m
polygraft.serving.candidate SOURCE CACHE [QUANTISE]` writes one line of JSON, a `Candidate` or why there is none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from polygraft.cluster.model import Backbone, Dtype
from polygraft.grafts.runtime.checked import BackboneError, read_config
from polygraft.grafts.runtime.pretrained import Quantise, check_hub_id, fingerprint, materialise
from polygraft.grafts.sites import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A folder that packs can load, and replicas if it `decodes`; `context_length` None: its positions have no
    limit."""

    folder: str
    fingerprint: str
    context_length: int | None
    decodes: bool

    def backbone(self, name: str, *, dtype: Dtype, quantise: Quantise | None, at: float, asked: bool) -> Backbone:
        """Its record, added `at`; `asked`, too, it is loaded at once."""
        return Backbone(
            name=name,
            folder=self.folder,
            dtype=dtype,
            quantise=quantise,
            fingerprint=self.fingerprint,
            context_length=self.context_length,
            added_at=at,
            asked_at=at if asked else 0.0,
        )


def candidate(source: str, cache: Path, quantise: Quantise | None) -> Candidate:
    """What `materialise` makes of the source. Raises BackboneError, for a model that neither decodes nor classifies
    texts, too."""
    folder = materialise(source, cache)
    shape = ModelShape.from_config(read_config(folder))
    if shape.head_kind is None:
        wanted = "give a causal language model, or an encoder that classifies texts"
        raise BackboneError(f"backbone: {folder}: {shape.sees}; {wanted}")
    return Candidate(
        folder=str(folder),
        fingerprint=fingerprint(folder, quantise),
        context_length=shape.positions or None,
        decodes=shape.causal,
    )


def examined(source: str, cache: Path, quantise: Quantise | None) -> Candidate:
    """`candidate` in a process of its own. Raises BackboneError."""
    if "\0" in source:  # which no process can be told
        check_hub_id(source)
    told = [source, str(cache), *([quantise] if quantise else [])]
    process = [sys.executable, "-m", "polygraft.serving.candidate", *told]
    said = subprocess.run(process, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False).stdout
    if not said:
        raise BackboneError(f"backbone: {source!r} could not be read; the service's log says why")
    answer = json.loads(said)
    if "refused" in answer:
        raise BackboneError(answer["refused"])
    return Candidate(**answer)


def main(source: str, cache: Path, quantise: str | None) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    try:
        answer: dict[str, object] = asdict(candidate(source, cache, quantise))
    except BackboneError as error:
        answer = {"refused": str(error)}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
