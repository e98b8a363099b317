"""Every event is told, by the names under which it is found."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.cluster.events import Event
from polygraft.cluster.story import names, tell
from tests.cluster.store.test_codec import plain

GIVEN = dict.fromkeys(("at", "until"), st.floats(0, 1e9)) | {
    field: st.just(f"this {field}") for field in ("job", "pack", "replica", "device", "backbone")
}


@pytest.mark.parametrize("kind", get_args(Event), ids=lambda kind: kind.__name__)
def test_an_event_is_told_with_what_it_is_about(kind: type[Event]) -> None:
    its = {field.name: GIVEN[field.name] for field in fields(kind) if field.name in GIVEN}

    @settings(max_examples=1)
    @given(plain(kind, **its))
    def told(event: Event) -> None:
        said, subjects = tell(event), {f"this {field}" for field in its.keys() - {"at", "until"}}
        assert said.strip() and all(subject in said for subject in subjects)
        assert not subjects or subjects & names(event)

    told()
