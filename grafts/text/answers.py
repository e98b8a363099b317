"""Where in a rendered conversation the text lies that the assistant has to write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from polygraft.grafts.text.chat import ChatError
from polygraft.grafts.text.message import Message

Render = Callable[[Sequence[Message]], str]
_REWRITES = "the chat template rewrites the assistant's text, so its tokens cannot be found"
_PRIVATE = range(0xF0000, 0x10FFFE)  # Unicode's private planes: characters nobody has given a meaning


def answers(messages: Sequence[Message], text: str, render: Render, opening: str) -> list[range]:
    """Characters of `text`, which is `messages` rendered, for each message: of a trained one what the assistant writes,
    from the end of `opening` (what the template writes before it generates) if that stands there, else from where the
    content begins, up to the content's end; empty for the others.

    The conversation is rendered a second time with private characters in the contents. Unlike comparing renderings of
    growing prefixes, this holds for templates that treat the last turn, the first turn or a missing system prompt in
    their own way. Raises ChatError for a template that rewrites what is said: it may change white space, write before
    an answer and leave out its beginning, as those of reasoning models do with thoughts.
    """
    found = _kept_whole(messages, text, render)
    if found is None:
        found = _taken_apart(messages, text, render, opening)
    return [
        range(_opened(text, opening, before.stop, place.start), place.stop) if message.trained else place
        for message, before, place in zip(messages, _before(found), found, strict=True)
    ]


def _kept_whole(messages: Sequence[Message], text: str, render: Render) -> list[range] | None:
    """With a mark before and after each content; None if the marks changed more than they added."""
    free = _free(messages, text)
    marks = [tuple(islice(free, 2)) if message.trained else () for message in messages]
    try:
        marked = render([_marked(m, *mark) if mark else m for m, mark in zip(messages, marks, strict=True)])
    except ChatError:
        return None
    every = [character for mark in marks for character in mark]
    if marked.translate({ord(character): None for character in every}) != text or any(
        marked.count(character) != 1 for character in every
    ):
        return None
    at = {marked.index(character): character for character in every}
    place = {character: index - before for before, (index, character) in enumerate(sorted(at.items()))}
    found = []
    for message, mark in zip(messages, marks, strict=True):
        start, stop = (place[mark[0]], place[mark[1]]) if mark else (0, 0)
        lead = message.content[: len(message.content) - len(message.content.lstrip())]
        found.append(range(start - len(lead) if text[:start].endswith(lead) else start, stop))
    return found


def _taken_apart(messages: Sequence[Message], text: str, render: Render, opening: str) -> list[range]:
    """With a private character in the place of each content: what the template writes between two of them, from the end
    of an answer to the next `opening`, stands in `text`, too."""
    free = _free(messages, text)
    signs = [next(free) if message.trained else "" for message in messages]
    replaced = render([Message(m.role, sign, m.weight) if sign else m for m, sign in zip(messages, signs, strict=True)])
    if any(replaced.count(sign) != 1 for sign in signs if sign):
        raise ChatError(_REWRITES)
    between, rest = [], replaced
    for sign in filter(None, signs):
        head, _, rest = rest.partition(sign)
        between.append(head[: head.rindex(opening) + len(opening)] if opening and opening in head else head)
    if not text.startswith(between[0]) or not text.endswith(rest):
        raise ChatError(_REWRITES)
    starts, stops = [len(between[0])], []
    for head in between[1:]:
        stop = text.find(head, starts[-1])
        if stop < 0:
            raise ChatError(_REWRITES)
        stops.append(stop)
        starts.append(stop + len(head))
    stops.append(len(text) - len(rest))
    trained = [message for message in messages if message.trained]
    for message, start, stop in zip(trained, starts, stops, strict=True):
        written, said = "".join(text[start:stop].split()), "".join(message.content.split())
        if not written or not (said.endswith(written) or written.endswith(said)):
            raise ChatError(_REWRITES)
    places = iter(zip(starts, stops, strict=True))
    return [range(*next(places)) if sign else range(0) for sign in signs]


def _opened(text: str, opening: str, floor: int, start: int) -> int:
    """Where the assistant begins to write: after the last `opening` between the answer before and the content."""
    at = text.rfind(opening, floor, start) if opening else -1
    return start if at < 0 else at + len(opening)


def _before(found: Sequence[range]) -> list[range]:
    """For each place the last one before it that is not empty."""
    last, out = range(0), []
    for place in found:
        out.append(last)
        last = place or last
    return out


def _free(messages: Sequence[Message], text: str) -> Iterator[str]:
    """Private characters that stand nowhere in the conversation."""
    letters = set().union(*(message.content for message in messages), text)
    return (chr(code) for code in _PRIVATE if chr(code) not in letters)


def _marked(message: Message, before: str, after: str) -> Message:
    """Marks inside the white space at the ends, which templates like to trim."""
    core = message.content.strip()
    lead, _, trail = message.content.partition(core) if core else ("", "", message.content)
    return Message(message.role, f"{lead}{before}{core}{after}{trail}", message.weight)
