"""Generated bodies for files, jobs, chats and texts: near a good one, far from any, and large."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from polygraft.grafts.methods.registry import methods
from polygraft.serving.http.generations import ChatCompletionRequest, CompletionRequest

LARGE = 3 << 20
CHAT_PATH, TEXT_PATH, JOBS_PATH, FILES_PATH = "/chat/completions", "/completions", "/fine_tuning/jobs", "/files"
JSON, FORM = "application/json", "multipart/form-data; boundary=b"
ROLES = ("system", "user", "assistant", "developer", "tool", "", "\udc00")
ODD_TEXTS = ("", "tiny", "a" * 5_000, "\x00", "<|im_end|>", "{{ 7 * 7 }}", "../../etc/passwd", "poems@1", "\ud800")
ODD_NUMBERS = (0, 1, 2, -1, 1e308, 10**400, 0.5, True, False, None)
ARGUMENTS = ("", "r=4", "r=0", "r=-1", "r=1e9", "r=99999999999", "at=attn.*", "at=", "r=4, r=4", "alpha=1e39", "'", "4")
KINDS = ("LORA", "IA3", "OFT", "BOFT", "LOHA", "VERA", "PREFIX_TUNING", "XLORA", "?")
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
TEXT = {"model": "tiny", "prompt": "Hi", "max_tokens": 1}
EXAMPLE = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@dataclass(frozen=True)
class Generated:
    """What is sent; `to` is the path under /v1."""

    to: str
    content: bytes
    kind: str

    def __repr__(self) -> str:  # Hypothesis shows it; a large body would hide everything else
        return f"Generated({self.to}, {self.content[:2_000]!r} of {len(self.content)} bytes, {self.kind})"


numbers = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(ODD_NUMBERS)
texts = st.text(max_size=40) | st.sampled_from(ODD_TEXTS)
values: SearchStrategy[Any] = st.recursive(
    numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=3)
message = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": texts | parts})
messages = st.lists(message | values, max_size=5)
layers = st.sampled_from(["", "@0", "@0-1", "@1-0", "@9999", "@-"])
names = st.sampled_from([*sorted(methods()), "nothing"])
terms = st.builds(lambda name, given, at: f"{name}({given}){at}", names, st.sampled_from(ARGUMENTS), layers)
config = st.fixed_dictionaries(
    {"peft_type": st.sampled_from(KINDS)},
    optional={
        "r": numbers,
        "target_modules": texts | st.lists(texts, max_size=3),
        "rank_pattern": values,
        "lora_alpha": numbers,
        "modules_to_save": values,
    },
)
pefts = st.lists(terms, max_size=3).map(" + ".join) | texts | config


def near(good: Mapping[str, Any], fields: Mapping[str, SearchStrategy[Any]]) -> SearchStrategy[dict[str, Any]]:
    """The good body with some fields changed: to what may be theirs, or to anything."""

    def change(names: set[str]) -> SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries({name: fields[name] | values for name in sorted(names)})

    chosen = st.sets(st.sampled_from(sorted(fields)), max_size=3)
    return chosen.flatmap(change).map(lambda changes: {**good, **changes})


def chats() -> SearchStrategy[dict[str, Any]]:
    fields = dict.fromkeys(ChatCompletionRequest.model_fields, values)
    fields |= {"messages": messages, "model": texts, "max_tokens": st.integers(0, 5) | numbers, "stream": st.booleans()}
    fields |= {"stop": texts | st.lists(texts, max_size=5), "odd": values}
    return near(CHAT, fields | dict.fromkeys(("temperature", "top_p", "seed"), numbers))


def completions() -> SearchStrategy[dict[str, Any]]:
    fields = dict.fromkeys(CompletionRequest.model_fields, values)
    ids = st.lists(numbers | st.integers(0, 600), max_size=5)
    prompts = texts | st.lists(texts, max_size=5) | ids | st.lists(ids, max_size=3)
    fields |= {"prompt": prompts, "model": texts, "max_tokens": st.integers(0, 5) | numbers, "stream": st.booleans()}
    fields |= dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "min_tokens", "seed"), numbers)
    return near(TEXT, fields | {"ignore_eos": st.booleans(), "odd": values})


def jobs(file: str) -> SearchStrategy[dict[str, Any]]:
    top = ("validation_file", "suffix", "seed", "metadata", "owner", "promote", "method", "model", "odd")
    inner = ("n_epochs", "batch_size", "learning_rate", "max_length", "dropout", "warmup_ratio", "max_grad_norm")

    def body(outer: dict[str, Any], hyperparameters: dict[str, Any]) -> dict[str, Any]:
        method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
        return {"method": method, **outer}

    outer = near({"model": "tiny", "training_file": file}, dict.fromkeys(top, values))
    return st.builds(body, outer, near({"peft": "lora(r=2)"}, {"peft": pefts, **dict.fromkeys(inner, numbers)}))


def form(file: bytes, purpose: str = "fine-tune") -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    tail = f'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n--b--\r\n'
    return head + file + tail.encode("utf-8", "replace")


def encoded(body: Any) -> bytes:
    return json.dumps(body).encode()


def cases(file: str) -> SearchStrategy[Generated]:
    """Bodies of all kinds; `file` is an uploaded one that jobs may name."""
    example = st.fixed_dictionaries({"messages": messages}, optional={"odd": values})
    line = st.just(encoded(EXAMPLE)) | st.binary(max_size=60) | (example | values).map(encoded)
    upload = st.builds(form, st.lists(line, max_size=6).map(b"\n".join), st.just("fine-tune") | texts)
    anywhere = st.sampled_from([CHAT_PATH, TEXT_PATH, JOBS_PATH, FILES_PATH])
    return st.one_of(
        chats().map(lambda body: Generated(CHAT_PATH, encoded(body), JSON)),
        completions().map(lambda body: Generated(TEXT_PATH, encoded(body), JSON)),
        jobs(file).map(lambda body: Generated(JOBS_PATH, encoded(body), JSON)),
        upload.map(lambda content: Generated(FILES_PATH, content, FORM)),
        st.builds(Generated, anywhere, st.binary(max_size=200), st.sampled_from([JSON, FORM])),
        st.builds(Generated, anywhere, values.map(encoded), st.just(JSON)),
    )


def large_cases() -> list[Generated]:
    """Bodies of megabytes, each sent to all of them."""

    def chat(**fields: Any) -> bytes:
        return encoded({**CHAT, **fields})

    user = {"role": "user", "content": "a"}

    def text(prompt: Any) -> bytes:
        return encoded({**TEXT, "prompt": prompt})

    contents = [
        text([{}] * (LARGE // 4)),
        text([[1]] * (LARGE // 5)),
        text([1.5] * (LARGE // 5)),
        text([5] * (LARGE // 3)),
        text(["a"] * (LARGE // 5)),
        b"[" * LARGE,
        b"[" + b"1," * (LARGE // 2) + b"1]",
        b"[" + b"[]," * (LARGE // 3) + b"1]",
        b"{" + b",".join(b'"%d":{}' % n for n in range(LARGE // 12)) + b"}",
        b"{" + b",".join(b'"%d":0' % n for n in range(80_000)) + b',"79999":1}',
        b"9" * LARGE,
        chat(messages=[user] * (LARGE // 40)),
        chat(messages=[{"role": "u", "content": 1}] * (LARGE // 40)),
        chat(messages=[{**user, "content": "a " * (LARGE // 2)}]),
        chat(messages=[{**user, "content": "\x00" * (LARGE // 6)}]),
        chat(stop=["a" * (LARGE // 4)] * 4),
        chat(metadata={str(n): "x" for n in range(LARGE // 20)}),
        chat(**{str(n): 0 for n in range(LARGE // 12)}),
    ]
    json_cases = [Generated(to, content, JSON) for content in contents for to in (CHAT_PATH, TEXT_PATH, JOBS_PATH)]
    return json_cases + [Generated(FILES_PATH, form(content), FORM) for content in contents]
