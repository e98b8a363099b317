"""How text becomes token ids and loss weights: the backbone's tokenizer.json and chat template, read directly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from polygraft.grafts.text.answers import answers
from polygraft.grafts.text.chat import Chat, ChatError
from polygraft.grafts.text.jsonl import DataError, Example
from polygraft.grafts.text.labelled import Labelled
from polygraft.grafts.text.message import Message, shown
from polygraft.grafts.text.special_tokens import SpecialTokens


class TokeniserError(ValueError):
    """A folder whose tokenizer cannot be used; the message names the file."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A training example. `weights[t]` is the loss weight of predicting `ids[t]`, so `weights[0]` is 0. `cut` tokens at
    its end were left out, `unlearned` of them with a weight."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    cut: int = field(default=0, compare=False)
    unlearned: int = field(default=0, compare=False)


class Tokeniser:
    """A tokenizer with its chat template and stop tokens. Build it with `Tokeniser.load`. Threads can share it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: Chat | None,
        eos_ids: tuple[int, ...],
        fingerprint: str,
        embedded: int | None = None,
    ) -> None:
        """`embedded` is how many tokens the backbone has embeddings for; None: nobody has said."""
        tokenizer.no_truncation()  # tokenizer.json may ask for either; lengths are ours to decide
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        added = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.content.strip()}
        self._ends = added.union(eos_ids)  # what can end a turn, whether or not a file calls it special
        self._embedded = embedded
        self.chat = chat
        self.eos_ids = eos_ids
        self.fingerprint = fingerprint

    @staticmethod
    def load(folder: Path) -> Tokeniser:
        """From tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja,
        generation_config.json and config.json.

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
        config, model = _json(folder / "tokenizer_config.json"), _json(folder / "config.json")
        map_file, added_file = _json(folder / "special_tokens_map.json"), _json(folder / "added_tokens.json")
        special = SpecialTokens.of(config, map_file, added_file)
        special.add_to(tokenizer)
        named = special.named
        template = _template(folder, config)
        eos = {id for file in (_json(folder / "generation_config.json"), model) for id in _ids(file)}
        if (token := named.get("eos_token")) and (id := tokenizer.token_to_id(token)) is not None:
            eos.add(id)
        parts = [sha256(raw).hexdigest(), template, sorted(named.items()), sorted(eos)]
        fingerprint = sha256(json.dumps(parts).encode()).hexdigest()
        chat = None if template is None else Chat(template, named)
        vocab = model.get("vocab_size")
        embedded = vocab if isinstance(vocab, int) else None
        return Tokeniser(tokenizer, chat, tuple(sorted(eos)), fingerprint, embedded)

    @property
    def vocabulary(self) -> int:
        """How many ids there are, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode_text(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Plain text, with the `special` tokens (such as BOS) the tokenizer itself puts around it. Raises ChatError for
        a token without an embedding."""
        return tuple(self._known(self._tokenizer.encode_batch([text], add_special_tokens=special)[0]).ids)

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> tuple[int, ...]:
        """What transformers' `apply_chat_template` gives. Raises ChatError, for a token without an embedding too."""
        return tuple(self._encode(self._chat.render(messages, add_generation_prompt=add_generation_prompt)).ids)

    def encode_example(self, example: Example, max_length: int | None) -> Tokens:
        """The whole conversation, cut after `max_length` tokens, if any. Weighted: what the assistant writes of each
        trained message (`answers`) and the token that ends its turn; everything else is 0.

        Raises DataError naming the example's line if the template refuses it, the backbone has no embedding for a
        token, or no weighted token is left.
        """
        try:
            text = self._rendered(example.messages)
            contents = answers(example.messages, text, self._rendered, self._chat.opening)
            encoding = self._encode(text)
        except ChatError as error:
            raise DataError(example.line, str(error)) from error
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
        left = [] if max_length is None else weights[max_length:]
        unlearned = sum(weight > 0 for weight in left)
        return Tokens(tuple(encoding.ids[:max_length]), tuple(weights[:max_length]), len(left), unlearned)

    def encode_others(self, example: Example, max_length: int | None) -> tuple[Tokens, ...]:
        """The other choices of an example, each as an answer; () where there are none. Raises DataError as
        `encode_example` does, and for a choice that would be cut: what is left of it cannot be compared."""
        found = []
        for other in (example, *example.others) if example.choices else ():
            tokens = self.encode_example(other, max_length)
            if tokens.unlearned:
                text = shown(other.messages[-1].content)
                raise DataError(
                    example.line,
                    f"choices: {text} ends after {len(tokens.ids) + tokens.cut} tokens, of which {max_length} are kept "
                    "(max_length), so that it cannot be compared with the others; shorten it or raise max_length",
                )
            found.append(tokens)
        return tuple(found[1:])

    def encode_labelled(self, example: Labelled, max_length: int | None, *, last: bool) -> Tokens:
        """A text with the special tokens that the tokenizer itself puts around it, cut after `max_length` tokens, if
        any; the weight is on the one whose hidden state a classifier reads, the `last` or the first.

        Where it is the last, the second of two texts follows on a line of its own; else the tokenizer joins them,
        and what ends a text that is cut stays at its end, as [SEP] does. Raises DataError naming the line.
        """
        said: str | tuple[str, str] = example.text
        if example.second is not None:
            said = f"{example.text}\n{example.second}" if last else (example.text, example.second)
        try:
            ids = tuple(self._known(self._tokenizer.encode_batch([said], add_special_tokens=True)[0]).ids)
        except ChatError as error:
            raise DataError(example.line, str(error)) from None
        if not ids:
            raise DataError(example.line, "sentence: has no token")
        whole = len(ids)
        if max_length is not None and whole > max_length:
            ids = ids[:max_length] if last else (*ids[: max_length - 1], ids[-1])
        read = len(ids) - 1 if last else 0
        return Tokens(ids, tuple(float(place == read) for place in range(len(ids))), whole - len(ids))

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of `ids`, without `special` tokens unless they are asked for."""
        return self._tokenizer.decode(ids, skip_special_tokens=not special)

    def token(self, id: int) -> str | None:
        """The token as the vocabulary writes it; None where there is none of that id."""
        return self._tokenizer.id_to_token(id)

    @property
    def _chat(self) -> Chat:
        if self.chat is None:
            raise ChatError("the backbone's tokenizer has no chat template; use a chat model, or plain completions")
        return self.chat

    def _rendered(self, messages: Sequence[Message]) -> str:
        return self._chat.render(messages, add_generation_prompt=False)

    def _encode(self, text: str) -> Encoding:
        # A batch of one: `encode` keeps the interpreter to itself, for seconds where the text has megabytes.
        return self._known(self._tokenizer.encode_batch([text], add_special_tokens=False)[0])

    def _known(self, encoding: Encoding) -> Encoding:
        """`encoding`, if the backbone has an embedding for each of its tokens; a tokenizer can have more than it."""
        most = max(encoding.ids, default=0)
        if self._embedded is not None and most >= self._embedded:
            raise ChatError(
                f"{shown(self._tokenizer.id_to_token(most))} is token {most}, for which the backbone has no embedding: "
                f"its vocabulary has {self._embedded} (0 to {self._embedded - 1}); leave it out of the text"
            )
        return encoding

    def _turn(self, encoding: Encoding, text: str, content: range) -> range:
        """The tokens that hold some of `content`, on to the added token after it if only white space lies between.

        A first token may begin before it: templates that write a space first make it one with the first word.
        """
        offsets = encoding.offsets
        first = next((i for i, (_, stop) in enumerate(offsets) if stop > content.start), len(offsets))
        last = next((i for i in range(first, len(offsets)) if offsets[i][0] >= content.stop), len(offsets))
        for index in range(last, len(offsets)):
            if text[content.stop : offsets[index][0]].strip():
                break
            if encoding.ids[index] in self._ends:
                return range(first, index + 1)
        return range(first, last)


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
