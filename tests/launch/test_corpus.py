"""The demo's data is split as it says."""

from __future__ import annotations

import pytest

from polygraft.grafts.text.jsonl import read
from polygraft.grafts.text.message import Message
from polygraft.launch import corpus
from polygraft.launch.corpus import Corpus, CorpusError, Pair, load


@pytest.fixture(scope="module")
def data() -> Corpus:
    return load()


def test_there_are_eight_tenants_with_at_least_a_hundred_pairs_and_twenty_held_out(data: Corpus) -> None:
    assert len({share.name for share in data.tenants}) == 8
    for share in (*data.tenants, data.search):
        assert 100 <= len(share.train) + len(share.held_out) <= 110, share.name
        assert len(share.held_out) >= 20, share.name


def test_no_question_is_in_two_places(data: Corpus) -> None:
    sides = [side for share in (*data.tenants, data.search) for side in (share.train, share.held_out)]
    keys = [{pair.key for pair in side} for side in sides]
    assert sum(map(len, keys)) == len(set().union(*keys))


def test_no_pair_is_given_twice(data: Corpus) -> None:
    pairs = [pair for share in (*data.tenants, data.search) for pair in (*share.train, *share.held_out)]
    assert len(pairs) == len(set(pairs))


def test_the_same_arguments_give_the_same_corpus(data: Corpus) -> None:
    assert load() == data


def test_the_pairs_of_a_share_are_the_shortest_of_its_topics(data: Corpus) -> None:
    fewer, more = (load(most=most).tenants[1] for most in (40, 80))
    longest = max(pair.characters for pair in (*fewer.train, *fewer.held_out))
    left = {*more.train, *more.held_out} - {*fewer.train, *fewer.held_out}
    assert min(pair.characters for pair in left) >= longest


def test_a_share_is_written_in_the_format_of_training_files(data: Corpus) -> None:
    share = data.tenants[0]
    found = [example.messages for example in read(share.held_out_jsonl)]
    assert found == [(Message("user", p.question), Message("assistant", p.answer)) for p in share.held_out]
    assert len(list(read(share.train_jsonl))) == len(share.train)


def test_questions_are_the_same_whatever_their_case_and_punctuation() -> None:
    assert Pair("What  is AI?", "x").key == Pair("what is ai", "y").key != Pair("What is an AI?", "x").key


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "find_spec", lambda _: None)
    with pytest.raises(CorpusError, match=r"chatterbot-corpus.*pip install 'polygraft\[embedded\]'"):
        load()
