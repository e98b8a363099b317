"""What a tree computes, as digests by name: one side of `parity.py`.

python benchmarks/parity_probe.py TREE --out PATH [--quick] [--only PART ...] [--threads N]

Run with the tree's folders as `polygraft`. Everything is drawn from fixed seeds, and nothing depends on time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"})

import kernels_elsewhere  # noqa: F401
import parity_files
import parity_forward
import parity_names
import parity_serve
import parity_train
import torch
from parity_record import Record
from parity_texts import Texts
from transformers.utils.logging import disable_progress_bar

# In the order they are run: each takes the record, the folder of the models, and the texts.
PARTS = {
    "train": parity_train.methods,
    "dropped": parity_train.dropped_and_united,
    "fallback": parity_train.with_torchs_products,
    "mezo": parity_train.without_a_backward,
    "nf4": parity_train.quantised,
    "architectures": parity_train.architectures,
    "forward": parity_forward.forward,
    "serve": parity_serve.serve,
    "files": parity_files.files,
    "checkpoint": parity_files.checkpoints,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tree", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", choices=PARTS)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    tree = given.tree.resolve()
    found = Path(sys.modules[parity_names.Backbone.__module__].__file__ or "").resolve()
    if not found.is_relative_to(tree):
        raise SystemExit(f"polygraft is {found}, which is not of {tree}")
    parity_names.tests_of(tree)
    torch.set_num_threads(given.threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    record, texts = Record(), Texts.read(quick=given.quick)
    with tempfile.TemporaryDirectory() as folder:
        for name, part in PARTS.items():
            if not given.only or name in given.only:
                torch.manual_seed(0)
                with record.part(name):
                    part(record, Path(folder), texts)
    given.out.write_text(json.dumps({"digests": record.digests, "seconds": record.seconds}, indent=0))


if __name__ == "__main__":
    main()
