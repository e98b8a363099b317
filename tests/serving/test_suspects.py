"""In which order the streams of a failed step are tried, and with how many rows."""

from __future__ import annotations

import pytest

from polygraft.serving.batch import Chunk
from polygraft.serving.sequence import Sequence
from polygraft.serving.suspects import Suspects
from tests.serving.engines import request

WRONG, NO_MEMORY = RuntimeError("shapes"), MemoryError()


def chunks(*rows: int) -> tuple[Chunk, ...]:
    return tuple(Chunk(Sequence(request=request(f"{n}", (5,)), arrival=0.0), count) for n, count in enumerate(rows))


def named(group: tuple[Chunk, ...]) -> str:
    return "".join(chunk.sequence.request.id for chunk in group)


def test_halves_are_tried_one_after_the_other_until_the_culprit_is_alone() -> None:
    suspects, five = Suspects(), chunks(1, 1, 1, 1, 1)
    assert suspects.next() == ()
    assert suspects.after_failure(five, WRONG) is None and named(suspects.next()) == "01"
    assert suspects.after_failure(suspects.next(), WRONG) is None and named(suspects.next()) == "0"
    assert suspects.after_failure(suspects.next(), WRONG) is five[0].sequence and named(suspects.next()) == "1"
    suspects.acquit(five[1].sequence)
    assert named(suspects.next()) == "234", "as they rode in the step that failed"
    suspects.acquit(five[3].sequence)
    assert named(suspects.next()) == "24"
    assert suspects.after_failure(suspects.next(), WRONG) is None and named(suspects.next()) == "2"
    for chunk in (five[2], five[4], five[4]):
        suspects.acquit(chunk.sequence)
    assert suspects.next() == ()


def test_one_that_has_no_memory_alone_is_tried_with_half_of_its_rows_down_to_one() -> None:
    suspects, (only,) = Suspects(), chunks(9)
    group: tuple[Chunk, ...] = (only,)
    for fewer in (4, 2, 1):
        assert suspects.after_failure(group, NO_MEMORY) is None
        assert suspects.next() == (group := (Chunk(only.sequence, fewer),))
    assert suspects.after_failure(group, NO_MEMORY) is only.sequence and suspects.next() == ()
    assert suspects.after_failure((only,), WRONG) is only.sequence, "which fewer rows would not mend"


@pytest.mark.parametrize(("needed", "tried"), [(6, [6]), (9, [])])
def test_no_fewer_rows_are_tried_than_it_must_have_at_once(needed: int, tried: list[int]) -> None:
    suspects = Suspects()
    sequence = Sequence(request=request("a", (5,) * needed), arrival=0.0)
    sequence.reads_prompt = True
    group: tuple[Chunk, ...] = (Chunk(sequence, 9),)
    for rows in tried:
        assert suspects.after_failure(group, NO_MEMORY) is None
        assert suspects.next() == (group := (Chunk(sequence, rows),))
    assert suspects.after_failure(group, NO_MEMORY) is sequence
