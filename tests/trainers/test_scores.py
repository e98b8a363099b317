"""Scores of held-out examples: those that transformers' logits give by each score's definition, and the same bits
whoever shares the pack."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from math import fsum
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from polygraft.cluster.model import FileId, Job, JobId, JobSpec, TenantId
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.text.jsonl import DataError
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.launch.demo.oracle.peft_oracle import peft_oracle
from polygraft.launch.demo.oracle.plain import Oracle
from polygraft.trainers.evaluate import judge
from polygraft.trainers.job import Question, Sample, TrainConfig, TrainJob
from polygraft.trainers.prepare import prepare
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.scores import macro_f1
from tests.tiny import TINY
from tests.trainers.test_packed_equals_alone import METHODS, jobs_of

GRAFT = BoundGraft(parse("lora(r=4, alpha=8, at=attn.[qv])"), TINY)
TEXTS = ("yes", "no", "a longer answer")
ROWS = 60  # of a forward, so that the examples are judged in several


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return {t.name: 0.3 * torch.randn(t.shape, generator=draw, dtype=torch.float64) for t in GRAFT.tensors}


@pytest.fixture(scope="module")
def oracle(folder: Path, values: dict[str, Tensor]) -> Oracle:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return peft_oracle(folder, config, values, torch.float64)


def greedy(oracle: Oracle, prompt: list[int], count: int) -> list[int]:
    said = list(prompt)
    for _ in range(count):
        said.append(int(oracle.logits(torch.tensor(said))[-1].argmax()))
    return said[len(prompt) :]


def sample(prompt: list[int], answer: list[int]) -> Sample:
    return Sample(tuple(prompt + answer), (0.0,) * len(prompt) + (1.0,) * len(answer))


@pytest.fixture(scope="module")
def examples(oracle: Oracle) -> tuple[Sample, ...]:
    """Eight with three choices; half of the right ones are what the oracle says greedily."""
    draw = torch.Generator().manual_seed(9)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 500, (count,), generator=draw).tolist()

    found = []
    for number in range(8):
        prompt = tokens(5 + number % 3)
        right = greedy(oracle, prompt, 4) if number % 2 else tokens(4)
        others = tuple(sample(prompt, tokens(count)) for count in ((2, 9) if number % 4 < 2 else (6, 9)))
        question = Question(TEXTS, number % 3, others)
        found.append(replace(sample(prompt, right), question=question))
    return tuple(found)


def test_scores_are_what_transformers_logits_give(
    oracle: Oracle, fp64: Backbone, values: dict[str, Tensor], examples: tuple[Sample, ...]
) -> None:
    matches, overlaps, right, right_by_bytes, pairs, losses = [], [], [], [], [], []
    for one in examples:
        question = one.question
        assert question is not None
        every = list(question.others)
        every.insert(question.answer, one)
        found = [_log_likelihood(oracle, choice) for choice in every]
        losses.append(-found[question.answer])
        taken = found.index(max(found))
        shares = [likelihood / len(text.encode()) for likelihood, text in zip(found, TEXTS, strict=True)]
        right.append(taken == question.answer)
        right_by_bytes.append(shares.index(max(shares)) == question.answer)
        pairs.append((question.answer, taken))
        start = one.weights.index(1.0)
        answer = list(one.ids[start:])
        matches.append(greedy(oracle, list(one.ids[:start]), len(answer)) == answer)
        guessed = oracle.logits(torch.tensor(one.ids[:-1])).argmax(-1)[start - 1 :].tolist()
        overlaps.append(sum((Counter(guessed) & Counter(answer)).values()) / len(answer))
    told = judge(fp64, GRAFT, values, examples, ROWS)
    assert told.loss == pytest.approx(fsum(losses) / sum(one.weight for one in examples), rel=1e-9)
    assert 0 < sum(matches) < len(matches) and 0 < sum(right) < len(right)
    assert told.scores.exact_match == pytest.approx(sum(matches) / 8)
    assert told.scores.token_f1 == pytest.approx(sum(overlaps) / 8)
    assert told.scores.accuracy == pytest.approx(sum(right) / 8)
    assert told.scores.accuracy_norm == pytest.approx(sum(right_by_bytes) / 8)
    assert told.scores.macro_f1 == pytest.approx(_macro_f1(pairs))
    assert told.scores.score == told.scores.accuracy


def _log_likelihood(oracle: Oracle, one: Sample) -> float:
    rows = oracle.logits(torch.tensor(one.ids[:-1])).log_softmax(-1)
    chosen = rows.gather(1, torch.tensor(one.ids[1:])[:, None])[:, 0]
    return float((chosen.detach() * torch.tensor(one.weights[1:], dtype=torch.float64)).sum())


def _macro_f1(pairs: list[tuple[int, int]]) -> float:
    """scikit-learn's `f1_score(true, taken, average="macro", zero_division=0)`, by precision and recall."""
    scores = []
    for label in {label for pair in pairs for label in pair}:
        hits = sum(pair == (label, label) for pair in pairs)
        taken, true = sum(pair[1] == label for pair in pairs), sum(pair[0] == label for pair in pairs)
        precision, recall = hits / taken if taken else 0.0, hits / true if true else 0.0
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [("aa bb", 1.0), ("ab ba", 0.0), ("aa aa ab", 0.4), ("aa ab bb bc", (2 / 3 + 1 / 2 + 0) / 3)],
)
def test_a_class_counts_as_much_as_any_other(pairs: str, expected: float) -> None:
    assert macro_f1((one[0], one[1]) for one in pairs.split()) == pytest.approx(expected)


def test_examples_with_choices_of_their_own_have_no_f1_of_classes_and_those_without_no_accuracy(
    fp64: Backbone, values: dict[str, Tensor], examples: tuple[Sample, ...]
) -> None:
    question = examples[0].question
    assert question is not None
    other = replace(examples[0], question=replace(question, texts=("yes", "no", "perhaps")))
    own = judge(fp64, GRAFT, values, (other, *examples[1:]), ROWS).scores
    assert own.macro_f1 is None and own.accuracy is not None
    plain = judge(fp64, GRAFT, values, [replace(one, question=None) for one in examples], ROWS).scores
    assert set(plain.told) == {"exact_match", "token_f1"} and plain.score == plain.exact_match


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_a_job_is_judged_to_be_does_not_hang_on_its_pack(
    dtype: torch.dtype, folder: Path, examples: tuple[Sample, ...], one_thread: None
) -> None:
    """Losses to the last bit, and scores, after training beside others as after training alone."""
    backbone = Backbone.load(folder, dtype, training=True)
    jobs = [replace(job, held_out=examples, test=examples[:3]) for job in jobs_of(3, METHODS)]

    def told(company: list[TrainJob]) -> Mapping[str, object]:
        pack, found = PackRunner(backbone, max_rows=140), {}
        for job in company:
            pack.admit(job)
        while pack.jobs:
            assert not pack.step().failed
            for name in [name for name, running in pack.jobs.items() if running.finished]:
                found[name] = pack.held_out(name), pack.tested(name)
                pack.remove(name)
        return found

    packed = told(jobs)
    for job in jobs[:: 1 if dtype == torch.float32 else 4]:
        assert told([job]) == {job.id: packed[job.id]}


def test_a_job_learns_what_its_scores_measure(folder: Path, one_thread: None) -> None:
    """Four pairs by heart: every answer is reproduced, and the right choice is the likeliest."""
    draw = torch.Generator().manual_seed(3)
    prompts = torch.randint(3, 500, (4, 6), generator=draw).tolist()
    answers = torch.randint(3, 500, (4, 3), generator=draw).tolist()
    train = tuple(sample(*pair) for pair in zip(prompts, answers, strict=True))
    asked = tuple(
        replace(one, question=Question(("a", "b"), 0, (sample(prompt, answers[i - 1]),)))
        for i, (one, prompt) in enumerate(zip(train, prompts, strict=True))
    )
    config = TrainConfig(epochs=60, batch_size=4, learning_rate=0.02)
    pack = PackRunner(Backbone.load(folder, torch.float32, training=True))
    pack.admit(TrainJob("job", BoundGraft(parse("lora(r=8)"), TINY), config, train, asked))
    before = pack.held_out("job")
    while not pack.jobs["job"].finished:
        pack.step()
    after = pack.held_out("job")
    assert before is not None and after is not None
    assert before.scores.exact_match == 0.0 and after.loss < 1 < before.loss
    assert after.scores.told == dict.fromkeys(("exact_match", "token_f1", "accuracy", "accuracy_norm", "macro_f1"), 1.0)


CHOICES = ("The stock.", "The graft.", "The cloth.")
QUESTION = {"prompt": "What gives the fruit?", "choices": CHOICES, "answer": 1}


def prepared(folder: Path, data: Path, *, max_length: int | None = None) -> TrainJob:
    file = FileId("file-1")
    (data / f"{file}.jsonl").write_text(json.dumps(QUESTION) + "\n")
    spec = JobSpec(
        backbone="tiny", training_file=file, validation_file=file, test_file=file, peft="ia3", max_length=max_length
    )
    job = Job(id=JobId("ftjob-1"), tenant=TenantId("t"), spec=spec, created_at=0.0)
    return prepare(
        job, files=data, tokeniser=Tokeniser.load(folder), backbone_files=BackboneFiles(folder), micro_rows=128
    )


def test_a_choice_set_is_trained_on_its_right_choices_and_judged_on_all(folder: Path, tmp_path: Path) -> None:
    job, tokeniser = prepared(folder, tmp_path), Tokeniser.load(folder)
    (train,), (held_out,) = job.train, job.held_out
    assert train.question is None and held_out.question is not None and job.test == job.held_out
    assert (train.ids, train.weights) == (held_out.ids, held_out.weights)
    assert held_out.question.answer == 1 and held_out.question.texts == CHOICES
    said = [
        tokeniser.decode([id for id, weight in zip(one.ids, one.weights, strict=True) if weight])
        for one in held_out.each
    ]
    assert said == ["The graft.", "The stock.", "The cloth."]


def test_a_choice_that_would_be_cut_is_refused_with_its_line(folder: Path, tmp_path: Path) -> None:
    whole = max(len(one.ids) for one in prepared(folder, tmp_path).held_out[0].each)
    assert prepared(folder, tmp_path, max_length=whole)
    with pytest.raises(DataError, match=rf"line 1: choices: .* of which {whole - 2} are kept"):
        prepared(folder, tmp_path, max_length=whole - 2)


def test_a_token_of_another_choice_that_the_backbone_does_not_have_is_named_with_its_file() -> None:
    good, bad = Sample((1, 2), (0.0, 1.0)), Sample((1, 600), (0.0, 1.0))
    asked = replace(good, question=Question(("a", "b"), 0, (bad,)))
    config = TrainConfig(epochs=1, batch_size=1, learning_rate=0.1)
    with pytest.raises(ValueError, match="validation_file: token 600 of example 1"):
        TrainJob("job", GRAFT, config, (good,), (asked,)).check_tokens()
