"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polygraft.serving.http.stops import Stops

LETTERS = st.text("ab", max_size=12)


@given(pieces=st.lists(LETTERS, max_size=8), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_however_a_text_is_cut_it_ends_before_its_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    held = Stops(tuple(stops))
    shown = "".join(held.push(piece) for piece in pieces)
    assert held.hit == bool(ends)
    # A stop string that is complete ends the text at once, even if a longer one began before it.
    assert text.startswith(shown)
    if not ends:
        assert shown + held.flush() == text
    else:
        assert not any(stop in shown for stop in stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stops = Stops(("END", "</s>"))
    assert [stops.push(piece) for piece in ("one E", "N", "D", "more")] == ["one ", "", "", ""]
    assert stops.hit
    stops = Stops(("END",))
    assert [stops.push(piece) for piece in ("one E", "at")] == ["one ", "Eat"]
    assert not stops.hit and stops.flush() == ""


@given(
    early=st.lists(LETTERS, max_size=4), late=st.lists(LETTERS, max_size=4), stop=st.text("ab", min_size=1, max_size=4)
)
def test_a_stop_string_that_ends_early_is_text(early: list[str], late: list[str], stop: str) -> None:
    text, free = "".join([*early, *late]), len("".join(early))
    end = next((at for at in range(len(text)) if text.startswith(stop, at) and at + len(stop) > free), len(text))
    held = Stops((stop,))
    shown = "".join([*(held.push(piece, early=True) for piece in early), *(held.push(piece) for piece in late)])
    assert shown + held.flush() == text[:end] and held.hit == (end < len(text))
