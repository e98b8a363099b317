"""Small real tasks that a package ships: splits that share no question, labels and choices that are what they say."""

from __future__ import annotations

import json
from itertools import combinations

from polygraft.grafts.text.jsonl import read, read_labelled_texts
from polygraft.grafts.text.labelled import labels_of
from polygraft.launch.corpus import topics
from polygraft.launch.real_tasks import answer_to_a_question, topic_of_a_question


def test_topics_are_labels_and_no_question_is_in_two_parts() -> None:
    task = topic_of_a_question()
    parts = {name: list(read_labelled_texts(part)) for name, part in task.parts.items()}
    for one, other in combinations(parts.values(), 2):
        assert not {text.text for text in one} & {text.text for text in other}
    counts = {name: len(texts) for name, texts in parts.items()}
    assert counts["train"] > 250 and min(counts.values()) > 70
    assert {text.label for name in parts for text in parts[name]} == set(labels_of(parts["train"]))
    questions = {topic: {pair.question for pair in pairs} for topic, pairs in topics().items()}
    assert all(text.text in questions[text.label] for texts in parts.values() for text in texts)


def test_of_four_answers_one_is_the_questions() -> None:
    task = answer_to_a_question()
    answers = {(pair.question, pair.answer) for pairs in topics().values() for pair in pairs}
    examples = [example for part in task.parts.values() for example in read(part)]
    assert len(examples) > 400 and {example.answer for example in examples} == {0, 1, 2, 3}
    assert all(len(example.choices) == 4 for example in examples)
    assert all((example.messages[0].content, example.messages[1].content) in answers for example in examples)
    assert json.loads(task.test.splitlines()[0]).keys() == {"prompt", "choices", "answer"}
