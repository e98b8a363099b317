"""Digests by name: what one side of the comparison computed, bit for bit."""

from __future__ import annotations

import struct
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import torch
from parity_names import FormatError, SpecError
from torch import Tensor

Value = Tensor | float | int | str | bytes | Sequence["Value"] | Mapping[str, "Value"] | None


class Record:
    """What was computed, by name. A name that is put twice is an error of the probe."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def put(self, name: str, value: Value) -> None:
        assert name not in self.digests, f"{name} is recorded twice"
        digest = sha256()
        _feed(digest.update, value)
        self.digests[name] = digest.hexdigest()[:20]

    def folder(self, name: str, folder: Path) -> None:
        """Every file under `folder`."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{name}/{path.relative_to(folder)}", path.read_bytes())

    @contextmanager
    def item(self, name: str) -> Iterator[None]:
        """A refusal or an error inside is what is recorded under the name; the probe goes on."""
        try:
            yield
        except (SpecError, FormatError) as error:
            self.digests[f"{name}/refused"] = type(error).__name__
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            self.digests[f"{name}/raised"] = f"{type(error).__name__}: {error}"[:200]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The seconds that a part takes, and an error that ends it."""
        begun = time.monotonic()
        with self.item(name):
            yield
        self.seconds[name] = round(time.monotonic() - begun, 1)


def _feed(update: object, value: Value) -> None:
    """Type, shape and bits of the value."""
    assert callable(update)
    match value:
        case Tensor():
            kept = value.detach().cpu().contiguous()
            update(f"{kept.dtype}{tuple(kept.shape)}".encode())
            update(kept.flatten().view(torch.uint8).numpy().tobytes() if kept.numel() else b"")
        case float():
            update(b"f" + struct.pack("<d", value))
        case bytes():
            update(b"b" + value)
        case str() | int() | None:
            update(f"{type(value).__name__}:{value};".encode())
        case Mapping():
            for name in sorted(value):
                update(f"{name}=".encode())
                _feed(update, value[name])
        case _:
            update(f"[{len(value)}".encode())
            for one in value:
                _feed(update, one)
