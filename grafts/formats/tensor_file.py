"""Writing tensors to a safetensors file, whose failures are those of any other file."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from polygraft.kernels.common.room import is_full


def write_tensors(values: Mapping[str, Tensor], file: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Contiguous tensors, none of which shares storage with another. Raises OSError, with ENOSPC where the disk is
    full."""
    try:
        save_file(dict(values), file, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        if is_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from error
        raise OSError(f"{file}: {error}") from error
