"""docs/methods.md and its pages say what the registry holds and what was measured, and every method there is judged."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from polygraft.grafts.catalogue import entry, fingerprint
from polygraft.grafts.grammar import parse
from polygraft.grafts.methods.description import describe
from polygraft.grafts.methods.refused import REFUSED
from polygraft.grafts.methods.registry import methods
from polygraft.grafts.spec import SpecError
from tests.grafts.equalities import shown
from tests.grafts.page import DOCS, NEWER, NUMBERLESS, SURVEY, UNREAD, pages, rows_of

MEASURED = json.loads((DOCS / "methods.json").read_text())


def test_the_pages_are_those_of_the_registry_and_the_tests() -> None:
    expected = pages(MEASURED)
    there = {"methods.md", *(f"methods/{path.name}" for path in (DOCS / "methods").glob("*.md"))}
    assert there == expected.keys(), "stale: run `make methods`"
    assert {place for place, text in expected.items() if (DOCS / place).read_text() != text} == set(), "stale"


@pytest.mark.parametrize("name", methods())
def test_a_method_is_claimed_only_with_an_oracle(name: str) -> None:
    assert rows_of(name), "no row of the table has it"
    assert max(MEASURED[name]["logits"], MEASURED[name]["gradients"]) < 1e-9


@pytest.mark.parametrize("name", methods())
def test_what_the_readme_says_of_every_method_has_a_test(name: str) -> None:
    """Packed training has the bits of training alone, mixed decoding is decoding alone, and merged is unmerged."""
    asked = {"packed", "mixed", "oracle"} | ({"merged"} if entry(methods()[name]).mergeable else set())
    assert {kind for kind in asked if name not in shown()[kind]} == set()


def test_every_method_has_words_of_its_own() -> None:
    words = {name: describe(method) for name, method in methods().items()}
    for part in ("summary", "choose"):
        counts = Counter(getattr(one, part) for one in words.values())
        assert [text for text, times in counts.items() if times > 1] == []
    for name, one in words.items():
        assert min(len(one.summary), len(one.deviations), len(one.choose)) > 10, name
        assert len(one.summary) > 60, name


def test_every_methods_page_says_where_its_paper_states_it() -> None:
    """By the number of an equation; without one by section, algorithm or theorem, or as unread, and it says so."""
    told = {name for name, method in methods().items() if describe(method).stated}
    without = {name for name, method in methods().items() if method.paper.startswith("PEFT")}
    assert methods().keys() - told == UNREAD.keys() | without
    for name in methods():
        page = (DOCS / "methods" / f"{name}.md").read_text()
        deviations = page.split("## Deviations from the paper\n\n")[1].split("\n")[0]
        stated = re.search(r"^\| stated in \| (.+) \|$", page, re.MULTILINE)
        assert len(deviations) > 10 and stated is not None, name
        assert re.search(r"\d|not verified|no paper", stated[1]), name
        own = stated[1].split("; the survey's ")[0]
        unnumbered = "no numbered equation of the paper is quoted|the paper numbers no equation of it"
        assert re.search(rf"\beq\. \d|not verified|no paper|{unnumbered}", own), name
        assert (name in NUMBERLESS) == ("the paper numbers no equation of it" in own), name
    assert SURVEY.keys() <= {name for name in methods() if "eq. " not in " ".join(describe(methods()[name]).stated)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_says_why(name: str) -> None:
    with pytest.raises(SpecError, match=f"'{name}' is not here: ") as refusal:
        parse(f"lora + {name}")
    assert REFUSED[name] in str(refusal.value) and name not in methods()


def test_there_are_sixty_methods_of_the_survey_and_twenty_newer_ones() -> None:
    assert set(methods()) >= NEWER
    of_survey = {fingerprint(method) for name, method in methods().items() if name not in NEWER}
    newer = {fingerprint(method) for name, method in methods().items() if name in NEWER} - of_survey
    assert len(newer) >= 20
    assert len(of_survey) >= 60
