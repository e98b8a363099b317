"""Which special tokens a folder names, and which tokens it adds to those of tokenizer.json: in all the places in which
transformers looks, in its order (5.x, `PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer

Fields = Mapping[str, object]
STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """`named` are those that a template may write by name; `added` must be tokens of their own, in this order."""

    named: Mapping[str, str]
    added: tuple[AddedToken, ...]

    @staticmethod
    def of(
        config: Mapping[str, object], map_file: Mapping[str, object], added_file: Mapping[str, object]
    ) -> SpecialTokens:
        """From tokenizer_config.json, and where that lists no `added_tokens_decoder` (before transformers 4.34) from
        special_tokens_map.json, which wins over it, and added_tokens.json."""
        listed = config.get("added_tokens_decoder")
        fields = dict(config) if isinstance(listed, dict) else {**config, **map_file}
        more = fields.get("extra_special_tokens") or fields.get("additional_special_tokens") or ()
        found = {name: token for name, token in fields.items() if name in STANDARD}
        found |= {name: token for name, token in fields.items() if name.endswith("_token") and name not in STANDARD}
        if isinstance(more, dict):
            found, more = {**found, **more}, ()
        named = {name: token for name, value in found.items() if (token := _token(value)) is not None}
        extra = [token for value in more if (token := _token(value)) is not None] if isinstance(more, list) else []
        special = {token.content for token in (*named.values(), *extra)}
        if isinstance(listed, dict):
            by_id = {int(id): token for id, value in listed.items() if (token := _token(value)) is not None}
        else:
            by_id = {
                id: AddedToken(text, normalized=text not in special, special=text in special)
                for text, id in added_file.items()
                if isinstance(id, int)
            }
        ordered = [by_id[id] for id in sorted(by_id)]
        return SpecialTokens(
            {name: token.content for name, token in named.items()},
            tuple(_once((*ordered, *named.values(), *extra), {token.content for token in named.values()})),
        )

    def add_to(self, tokenizer: Tokenizer) -> None:
        """Make tokens of their own of those that are not yet."""
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_tokens([token for token in self.added if token.content not in known])


def _once(tokens: Iterable[AddedToken], named: set[str]) -> Iterator[AddedToken]:
    seen = set()
    for token in tokens:
        if token.content not in seen:
            seen.add(token.content)
            token.special = token.special or token.content in named
            yield token


def _token(value: object) -> AddedToken | None:
    """A token written as text, which is then special, or as an object with flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if not isinstance(value, dict) or not isinstance(content := value.get("content"), str):
        return None
    flags = {name: flag for name in _FLAGS if isinstance(flag := value.get(name), bool)}
    return AddedToken(content, **{"special": True, **flags})
