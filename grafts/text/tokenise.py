"""How text becomes token ids and loss weights: the backbone's tokenizer.json and chat template, read directly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from polygraft.grafts.text.chat import Chat, ChatError
from polygraft.grafts.text.jsonl import DataError, Example, Message

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PRIVATE = range(0xF0000, 0x10FFFE)  # Unicode's private planes: characters nobody has given a meaning


class TokeniserError(ValueError):
    """A folder whose tokenizer cannot be used; the message names the file."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A training example. `weights[t]` is the loss weight of predicting `ids[t]`, so `weights[0]` is 0."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


class Tokeniser:
    """A tokenizer with its chat template and stop tokens. Build it with `Tokeniser.load`. Threads can share it."""

    def __init__(self, tokenizer: Tokenizer, chat: Chat | None, eos_ids: tuple[int, ...], fingerprint: str) -> None:
        tokenizer.no_truncation()  # tokenizer.json may ask for either; lengths are ours to decide
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.chat = chat
        self.eos_ids = eos_ids
        self.fingerprint = fingerprint

    @staticmethod
    def load(folder: Path) -> Tokeniser:
        """From tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json and config.json.

        The stop tokens are all that any of the files calls end of sequence: chat models often name the end of a turn in
        only one of them. The fingerprint covers the tokenizer, the template, the special tokens and the stop tokens.
        Raises TokeniserError, or ChatError for a template that does not compile.
        """
        path = folder / "tokenizer.json"
        try:
            raw = path.read_bytes()
            tokenizer = Tokenizer.from_str(raw.decode("utf-8"))
        except FileNotFoundError:
            raise TokeniserError(f"{path} is missing; only fast tokenizers (tokenizer.json) are read") from None
        except Exception as error:  # the Rust library raises bare Exception for what it cannot parse
            raise TokeniserError(f"{path} is not a tokenizer: {str(error)[:200]}") from None
        config = _json(folder / "tokenizer_config.json")
        named = _special_tokens(config)
        template = _template(folder, config)
        eos = {id for file in ("generation_config.json", "config.json") for id in _ids(_json(folder / file))}
        if (token := named.get("eos_token")) and (id := tokenizer.token_to_id(token)) is not None:
            eos.add(id)
        parts = [sha256(raw).hexdigest(), template, sorted(named.items()), sorted(eos)]
        fingerprint = sha256(json.dumps(parts).encode()).hexdigest()
        chat = None if template is None else Chat(template, named)
        return Tokeniser(tokenizer, chat, tuple(sorted(eos)), fingerprint)

    @property
    def vocabulary(self) -> int:
        """How many ids there are, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Plain text, with the tokens (such as BOS) the tokenizer itself puts around it."""
        return tuple(self._tokenizer.encode_batch([text])[0].ids)

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> tuple[int, ...]:
        """What transformers' `apply_chat_template` gives. Raises ChatError."""
        return tuple(self._encode(self._chat.render(messages, add_generation_prompt=add_generation_prompt)).ids)

    def encode_example(self, example: Example, max_length: int) -> Tokens:
        """The whole conversation, cut after `max_length` tokens. Weighted: each trained assistant message's content and
        the special token that ends its turn; everything else is 0.

        Raises DataError naming the example's line if the template refuses it or no weighted token is left.
        """
        try:
            text = self._chat.render(example.messages, add_generation_prompt=False)
            contents = self._contents(example, text)
        except ChatError as error:
            raise DataError(example.line, str(error)) from error
        encoding = self._encode(text)
        weights = [0.0] * len(encoding.ids)
        for message, content in zip(example.messages, contents, strict=True):
            if message.trained:
                for index in self._turn(encoding, text, content):
                    weights[index] = float(message.weight)
        weights[:1] = [0.0]  # nothing stands before the first token
        if not any(weights[:max_length]):
            raise DataError(
                example.line,
                f"none of the first {max_length} tokens (max_length) of {len(weights)} is trained, because the "
                "assistant's text comes later; shorten the example or raise max_length",
            )
        return Tokens(tuple(encoding.ids[:max_length]), tuple(weights[:max_length]))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def _chat(self) -> Chat:
        if self.chat is None:
            raise ChatError("the backbone's tokenizer has no chat template; use a chat model, or plain completions")
        return self.chat

    def _encode(self, text: str) -> Encoding:
        # A batch of one: `encode` keeps the interpreter to itself, for seconds where the text has megabytes.
        return self._tokenizer.encode_batch([text], add_special_tokens=False)[0]

    def _contents(self, example: Example, text: str) -> list[range]:
        """Where in `text` the characters of each message's content lie; empty for messages that are not trained.

        The conversation is rendered a second time with a private character before and after the contents. Unlike
        comparing renderings of growing prefixes, this holds for templates that treat the last turn, the first turn or a
        missing system prompt in their own way. That the marks changed nothing else is checked.
        """
        letters = set().union(*(message.content for message in example.messages), text)
        free = (chr(code) for code in _PRIVATE if chr(code) not in letters)
        marks = [tuple(islice(free, 2)) if message.trained else () for message in example.messages]
        marked = self._chat.render(
            [_marked(m, *mark) if mark else m for m, mark in zip(example.messages, marks, strict=True)],
            add_generation_prompt=False,
        )
        every = [character for mark in marks for character in mark]
        if marked.translate({ord(character): None for character in every}) != text or any(
            marked.count(character) != 1 for character in every
        ):
            raise ChatError("the chat template rewrites the assistant's text, so its tokens cannot be found")
        at = {marked.index(character): character for character in every}
        place = {character: index - before for before, (index, character) in enumerate(sorted(at.items()))}
        found = []
        for message, mark in zip(example.messages, marks, strict=True):
            start, stop = (place[mark[0]], place[mark[1]]) if mark else (0, 0)
            lead = message.content[: len(message.content) - len(message.content.lstrip())]
            found.append(range(start - len(lead) if text[:start].endswith(lead) else start, stop))
        return found

    def _turn(self, encoding: Encoding, text: str, content: range) -> range:
        """The tokens that hold some of `content`, on to the special token after it if only white space lies between.

        A first token may begin before it: templates that write a space first make it one with the first word.
        """
        offsets = encoding.offsets
        first = next((i for i, (_, stop) in enumerate(offsets) if stop > content.start), len(offsets))
        last = next((i for i in range(first, len(offsets)) if offsets[i][0] >= content.stop), len(offsets))
        for index in range(last, len(offsets)):
            if text[content.stop : offsets[index][0]].strip():
                break
            if encoding.ids[index] in self._special:
                return range(first, index + 1)
        return range(first, last)


def _marked(message: Message, before: str, after: str) -> Message:
    """Marks inside the white space at the ends, which templates like to trim."""
    core = message.content.strip()
    lead, _, trail = message.content.partition(core) if core else ("", "", message.content)
    return Message(message.role, f"{lead}{before}{core}{after}{trail}", message.weight)


def _json(path: Path) -> dict[str, object]:
    """The object in a JSON file; empty if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TokeniserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokeniserError(f"{path} is not a JSON object")
    return value


def _special_tokens(config: dict[str, object]) -> dict[str, str]:
    """Named special tokens: strings, or in older files objects with `content`."""
    found = {name: config.get(name) for name in _SPECIAL}
    text = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: token for name, token in text.items() if isinstance(token, str)}


def _template(folder: Path, config: dict[str, object]) -> str | None:
    """chat_template.jinja, or the older entry of tokenizer_config.json: a string, or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _ids(config: dict[str, object]) -> list[int]:
    value = config.get("eos_token_id")
    return [id for id in (value if isinstance(value, list) else [value]) if isinstance(id, int)]
