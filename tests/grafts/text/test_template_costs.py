"""What a template's function reads and writes is known before it is called."""

from __future__ import annotations

import pytest

from polygraft.grafts.text.template_costs import TemplateLimit, price

LIMIT = 10_000


@pytest.mark.parametrize("place", ["{0}", "%s"])
def test_a_text_that_is_written_into_another_many_times_counts_each_time(place: str) -> None:
    argument = "a" * 5_000
    assert price("format", place, (argument,), LIMIT) == len(place) + len(argument)
    with pytest.raises(TemplateLimit, match="format on values too large"):
        price("format", place * 12, (argument,), LIMIT)


def test_what_is_read_is_bounded_whatever_is_written() -> None:
    assert price("upper", "a" * LIMIT, (), LIMIT) == LIMIT
    with pytest.raises(TemplateLimit, match="upper on values too large"):
        price("upper", "a" * (LIMIT + 1), (), LIMIT)
