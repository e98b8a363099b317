"""docs/methods.md says what the registry holds and what was measured, and every method there has been judged."""

from __future__ import annotations

import json

import pytest

from polygraft.grafts.catalogue import fingerprint
from polygraft.grafts.grammar import parse
from polygraft.grafts.methods.refused import REFUSED
from polygraft.grafts.methods.registry import methods
from polygraft.grafts.spec import SpecError
from tests.grafts.page import DOCS, ELSEWHERE, NEWER, page, rows_of

MEASURED = json.loads((DOCS / "methods.json").read_text())


def test_the_page_is_that_of_the_registry() -> None:
    assert (DOCS / "methods.md").read_text() == page(MEASURED), "stale: run `make methods`"


@pytest.mark.parametrize("name", methods())
def test_a_method_is_claimed_only_with_an_oracle(name: str) -> None:
    if name in ELSEWHERE:
        assert name in (DOCS.parent / ELSEWHERE[name]).read_text()
    else:
        assert rows_of(name), "no row of the table has it"
        assert max(MEASURED[name]["logits"], MEASURED[name]["gradients"]) < 1e-9


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
