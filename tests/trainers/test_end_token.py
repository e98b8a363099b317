"""A job learns to stop: the end of a turn is among what is trained, whatever tokenizer.json calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from polygraft.cluster.model import FileId, Job, JobId, JobSpec, TenantId
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.route import Rows, Span
from polygraft.grafts.runtime.stacks import Resident
from polygraft.grafts.text.message import Message
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers.prepare import prepare
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.running import RunningJob
from tests.tiny import tiny_llama

FILE = FileId("file-1")
SPEC = JobSpec(
    backbone="tiny", training_file=FILE, peft="lora(r=16, alpha=32)", learning_rate=0.002, epochs=300, batch_size=1
)


@pytest.mark.nightly
def test_a_token_that_no_file_calls_special_ends_the_answer(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tiny", layers=4, tied=False)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    messages = [{"role": "user", "content": "code?"}, {"role": "assistant", "content": "blue forty two"}]
    (tmp_path / f"{FILE}.jsonl").write_text(json.dumps({"messages": messages}))
    tokeniser, backbone = Tokeniser.load(folder), Backbone.load(folder, torch.float32, training=True)
    record = Job(id=JobId("ftjob-1"), tenant=TenantId("t"), spec=SPEC, created_at=0.0)
    runner = PackRunner(backbone)
    active = runner.admit(
        prepare(record, files=tmp_path, tokeniser=tokeniser, backbone_files=BackboneFiles(folder), micro_rows=128)
    )
    while not active.finished:
        runner.step()
    prompt = tokeniser.encode_chat([Message("user", "code?")], add_generation_prompt=True)
    *answer, end = _greedy(backbone, active, prompt, tokeniser.eos_ids)
    assert (tokeniser.decode(answer), end in tokeniser.eos_ids) == ("blue forty two", True)


def _greedy(backbone: Backbone, active: RunningJob, prompt: tuple[int, ...], ends: tuple[int, ...]) -> list[int]:
    """Up to 30 tokens, the last of them the first that is in `ends`."""
    stacks = backbone.stacks([Resident("g", active.job.graft, active.slab.tensors)])
    ids = list(prompt)
    with torch.inference_mode():
        while len(ids) < len(prompt) + 30:
            rows = Rows(torch.tensor(ids), torch.arange(len(ids)), (Span(0, len(ids), 0),))
            attention = WholeSequences(((0, len(ids)),), backbone.shape)
            hidden = backbone.forward(rows, stacks, attention)
            ids.append(int(backbone.logits(hidden[-1:])[0].argmax()))
            if ids[-1] in ends:
                break
    return ids[len(prompt) :]
