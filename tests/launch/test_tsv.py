"""TSV files as GLUE has them, on their way to a job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polygraft.launch.output import Failure
from polygraft.launch.tsv import jsonl_of


def test_a_file_of_glues_is_labelled_texts(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text('index\tsentence1\tsentence2\tlabel\n0\ta "b\tc\t1\n\n1\td\té\t0\n', encoding="utf-8")
    assert [json.loads(line) for line in jsonl_of(path).splitlines()] == [
        {"sentence1": 'a "b', "sentence2": "c", "label": "1"},
        {"sentence1": "d", "sentence2": "é", "label": "0"},
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "line 1 names the columns none; it needs label and one of sentence, sentence1, text"),
        ("sentence\tscore\n", "line 1 names the columns sentence, score; it needs label"),
        ("sentence\tlabel\na\tb\tc\n", "line 2 has 3 columns, the first one 2"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text(content)
    with pytest.raises(Failure, match=said):
        jsonl_of(tmp_path / "t.tsv")
