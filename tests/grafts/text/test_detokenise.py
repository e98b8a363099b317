"""Text comes out of tokens as they arrive: whole characters, every space, and the same as decoding all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from polygraft.grafts.text.detokenise import Detokeniser
from polygraft.grafts.text.tokenise import Tokeniser

TEXTS = [
    "A shoot, set  into\n\n another.",
    "déjà vu: 日本語の👩‍🌾!",
    "  spaces first",
    "ends in 👋",
    "\ufffd mark \ufffd\ufffd",
]


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Tokeniser:
    return Tokeniser.load(tiny_folder)


@pytest.fixture(scope="module")
def fallback() -> Tokeniser:
    """In the manner of Llama 2: a mark for each space, the first dropped, and bytes for characters it does not have."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Paris", "▁is", "big", "好"]
    tokenizer = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokeniser(tokenizer, None, (), "")


def known(tokeniser: Tokeniser, piece: str) -> int:
    """The id of a piece that the vocabulary has."""
    found = tokeniser._tokenizer.token_to_id(piece)
    assert found is not None
    return found


def pieces(tokeniser: Tokeniser, ids: list[int], context: tuple[int, ...] = ()) -> list[str]:
    detokeniser = Detokeniser(tokeniser, context)
    return [detokeniser.feed([id]) for id in ids] + [detokeniser.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_hold_no_broken_character(tiny: Tokeniser, text: str) -> None:
    found = pieces(tiny, list(tiny.encode_text(text)))
    assert "".join(found) == text
    assert "".join(found).count("\ufffd") == text.count("\ufffd")


def test_a_character_is_shown_with_its_last_byte(tiny: Tokeniser) -> None:
    ids = list(tiny.encode_text("👋"))
    assert len(ids) == 4
    assert pieces(tiny, ids) == ["", "", "", "👋", ""]


@given(ids=st.lists(st.integers(0, 511), max_size=40), cuts=st.lists(st.integers(1, 5), min_size=40))
def test_any_ids_in_any_portions_give_the_text_of_all_at_once(tiny: Tokeniser, ids: list[int], cuts: list[int]) -> None:
    detokeniser, text, rest = Detokeniser(tiny), "", list(ids)
    for cut in cuts:
        text += detokeniser.feed(rest[:cut])
        rest = rest[cut:]
        assert tiny.decode(ids).startswith(text)  # what is shown is final
    assert text + detokeniser.finish() == tiny.decode(ids)


def test_state_is_rebuilt_from_ids(tiny: Tokeniser) -> None:
    ids = list(tiny.encode_text(TEXTS[1]))
    for cut in range(len(ids)):
        again = Detokeniser(tiny)
        shown = again.feed(ids[:cut])
        assert shown + again.feed(ids[cut:]) + again.finish() == TEXTS[1]


def test_bytes_that_never_become_a_character_are_not_held_back_for_ever(tiny: Tokeniser) -> None:
    byte = known(tiny, "Ģ")  # 0x80: the inside of a character, never its beginning
    detokeniser = Detokeniser(tiny)
    assert len(detokeniser.feed([byte] * 20)) >= 15


def test_a_space_that_the_decoder_drops_at_the_start_is_kept_after_a_prompt(fallback: Tokeniser) -> None:
    space, paris, is_, big = (known(fallback, piece) for piece in ("▁", "▁Paris", "▁is", "big"))
    assert pieces(fallback, [paris, is_, space, space, big]) == ["Paris", " is", " ", " ", "big", ""]
    assert pieces(fallback, [is_, is_], context=(paris,)) == [" is", " is", ""]


@given(text=st.text("日本語好é👋 ", max_size=20))
def test_characters_in_bytes_come_out_whole_with_a_byte_fallback_decoder(fallback: Tokeniser, text: str) -> None:
    whole = {"好": known(fallback, "好"), " ": known(fallback, "▁")}
    ids = [id for letter in text for id in ([whole[letter]] if letter in whole else letter.encode())]
    found = "".join(pieces(fallback, ids, context=(whole["好"],)))
    assert found == text


def test_special_tokens_are_no_text(tiny: Tokeniser) -> None:
    ids = list(tiny.encode_text("<|im_start|>a graft<|im_end|>"))
    assert "".join(pieces(tiny, ids)) == "a graft"
