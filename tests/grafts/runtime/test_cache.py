"""Decoding from the cache gives what the whole sequence gives, where the cache has a case of its own."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.cache import KVCache, PagedAttention, PagedSequence
from polygraft.grafts.runtime.route import Rows, Span
from polygraft.grafts.runtime.stacks import Resident


@pytest.mark.parametrize("peft", ["prefix(4)@0", "prefix(4)@1", "prefix(4)"])
def test_a_layer_without_prefix_rows_does_not_see_the_virtual_tokens(tiny_folder: Path, peft: str) -> None:
    backbone = Backbone.load(tiny_folder, torch.float32)
    graft = BoundGraft(parse(peft), backbone.shape)
    resident = Resident("g", graft, {t.name: torch.randn(t.shape) for t in graft.tensors})
    stacks, ids, p = backbone.stacks((resident,)), torch.arange(40, 60), graft.prefix_length
    cache = KVCache(backbone.shape, 8, dtype=torch.float32)
    cache.clear(range(8))
    cache.write_prefix((1, 2), resident)
    with torch.inference_mode():
        rows = Rows(ids, torch.arange(20) + p, (Span(0, 20, 0),))
        whole = backbone.forward(rows, stacks, WholeSequences(((0, 20),), backbone.shape))
        for start, stop in ((0, 7), (7, 19), (19, 20)):
            piece = Rows(ids[start:stop], torch.arange(start, stop) + p, (Span(0, stop - start, 0),))
            sequence = PagedSequence(0, stop - start, p + start, (1, 2), p, graft.prefix_layers)
            hidden = backbone.forward(piece, stacks, PagedAttention(cache, (sequence,)))
            torch.testing.assert_close(hidden, whole[start:stop], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["mistral", "qwen2", "gemma2", "gemma3_text"])
def test_decoding_goes_on_far_beyond_a_sliding_window(tiny_folders: Mapping[str, Path], arch: str) -> None:
    """Where whole buckets of blocks lie before the window and are not read."""
    backbone = Backbone.load(tiny_folders[arch], torch.float32)
    graft = BoundGraft(parse("prefix(4)@1"), backbone.shape)
    resident = Resident("g", graft, {t.name: torch.randn(t.shape) for t in graft.tensors})
    stacks, ids = backbone.stacks((resident,)), torch.arange(40, 240)
    p, table = graft.prefix_length, tuple(range(1, 14))
    cache = KVCache(backbone.shape, 14, dtype=torch.float32)
    cache.clear(range(14))
    cache.write_prefix(table, resident)
    with torch.inference_mode():
        rows = Rows(ids, torch.arange(200) + p, (Span(0, 200, 0),))
        whole = backbone.forward(rows, stacks, WholeSequences(((0, 200),), backbone.shape))
        for start, stop in ((0, 70), (70, 71), (71, 140), (140, 199), (199, 200)):
            piece = Rows(ids[start:stop], torch.arange(start, stop) + p, (Span(0, stop - start, 0),))
            sequence = PagedSequence(0, stop - start, p + start, table, p, graft.prefix_layers)
            hidden = backbone.forward(piece, stacks, PagedAttention(cache, (sequence,)))
            torch.testing.assert_close(hidden, whole[start:stop], rtol=1e-5, atol=1e-5)
            if arch == "mistral":  # the others have layers that see everything
                cache.data[:, list(table[: (stop + p - 5) // 64 * 4])] = float("nan")
