"""`/tokenize` and `/detokenize`, against transformers' tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from tests.serving.http.conftest import SETTINGS, Service, refusal

pytestmark = pytest.mark.anyio
TEXT = "What is a graft?"
CHAT = [{"role": "user", "content": TEXT}]


async def asked(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    answer = await client.post(f"http://test/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_text_and_a_conversation_have_the_tokens_that_transformers_gives_them(
    ann: httpx.AsyncClient, folder: Path
) -> None:
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    for body, expected in (
        ({"prompt": TEXT}, theirs.encode(TEXT)),
        ({"prompt": TEXT, "model": "tiny", "add_special_tokens": False}, theirs.encode(TEXT, add_special_tokens=False)),
        ({"messages": CHAT}, theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)),
        ({"messages": CHAT, "add_generation_prompt": False}, theirs.apply_chat_template(CHAT, return_dict=False)),
    ):
        found = await asked(ann, "tokenize", return_token_strs=True, **body)
        assert found == {
            "count": len(expected),
            "max_model_len": SETTINGS.max_context,
            "tokens": expected,
            "token_strs": theirs.convert_ids_to_tokens(expected),
        }
        assert (await asked(ann, "detokenize", tokens=expected))["prompt"] == theirs.decode(expected)


async def test_a_graft_has_the_tokens_of_its_backbone(service: Service, ann: httpx.AsyncClient) -> None:
    service.publish("ann", "ia3", "poems")
    bare = await asked(ann, "tokenize", prompt=TEXT)
    assert await asked(ann, "tokenize", prompt=TEXT, model="poems") == bare and bare["token_strs"] is None
    for path, body in (("tokenize", {"prompt": TEXT}), ("detokenize", {"tokens": bare["tokens"]})):
        refusal(await ann.post(f"http://test/{path}", json={**body, "model": "nobody"}), 404)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": TEXT, "messages": CHAT}, "prompt"),
        ("tokenize", {"messages": CHAT, "add_special_tokens": True}, "add_special_tokens"),
        ("tokenize", {"messages": []}, "messages"),
        ("detokenize", {}, "tokens"),
        ("detokenize", {"tokens": [5, 99_999]}, "tokens.1"),
        ("detokenize", {"tokens": [-1]}, "tokens.0"),
    ],
)
async def test_what_has_no_tokens_is_400_and_names_the_field(
    ann: httpx.AsyncClient, path: str, body: dict[str, Any], field: str
) -> None:
    error = refusal(await ann.post(f"http://test/{path}", json=body), 400)
    assert error["param"] == field and error["message"].startswith(field)
