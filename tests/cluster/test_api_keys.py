"""API keys: their text is shown once, kept hashed, and worthless when revoked."""

from __future__ import annotations

from hashlib import sha256

import pytest

from polygraft.cluster.api_keys import BadKey, admit_key, create_key, list_keys, revoke_key, verify_key
from polygraft.cluster.model import ApiKeyId, TenantId
from polygraft.cluster.store.memory import MemoryStore

T, U = TenantId("t"), TenantId("u")


def test_a_key_is_its_tenants_until_it_is_revoked() -> None:
    store = MemoryStore()
    key, text = create_key(store, tenant=T, name="laptop", at=1.0)
    assert text.startswith("pg-") and len(text) > 40
    assert verify_key(store, text) == key and key.tenant == T
    revoked = revoke_key(store, key.id, at=5.0)
    assert revoked is not None and revoked.revoked_at == 5.0
    assert verify_key(store, text) is None
    assert revoke_key(store, key.id, at=9.0) == revoked, "the first revocation stays"


def test_what_is_not_a_key_opens_nothing() -> None:
    store = MemoryStore()
    _, text = create_key(store, tenant=T, name="laptop", at=1.0)
    for wrong in ("", "pg-", text[:-1], f"{text}x", text.upper(), text.removeprefix("pg-"), "pg-../x"):
        assert verify_key(store, wrong) is None
    assert revoke_key(store, ApiKeyId("key-none"), at=1.0) is None


def test_the_store_holds_no_keys_text() -> None:
    store = MemoryStore()
    _, text = create_key(store, tenant=T, name="laptop", at=1.0)
    assert not any(text in stored for stored, _ in store._records.values())


def test_a_tenants_keys_are_listed_oldest_first() -> None:
    store = MemoryStore()
    made = [create_key(store, tenant=tenant, name="n", at=at)[0] for tenant, at in ((T, 3.0), (U, 2.0), (T, 1.0))]
    assert list_keys(store, T) == [made[2], made[0]]
    assert list_keys(store) == [made[2], made[1], made[0]]


def test_a_key_that_an_operator_made_opens_the_api_and_its_successor_replaces_it() -> None:
    store = MemoryStore()
    first, second = f"pg-{'a' * 40}", f"pg-{'b' * 40}"
    own, text = create_key(store, tenant=T, name="laptop", at=0.0)
    for _ in range(2):  # at each start
        key = admit_key(store, first, tenant=T, name="given", at=1.0)
    assert verify_key(store, first) == key
    admit_key(store, second, tenant=T, name="given", at=2.0)
    assert verify_key(store, first) is None and verify_key(store, second) is not None
    assert verify_key(store, text) == own, "other keys are left alone"
    revoke_key(store, ApiKeyId(f"key-{sha256(second.encode()).hexdigest()[:16]}"), at=3.0)
    admit_key(store, second, tenant=T, name="given", at=4.0)
    assert verify_key(store, second) is None, "what was revoked stays so"


@pytest.mark.parametrize("text", ["", "pg-", "secret", "pg-short", f"sk-{'a' * 40}", f"pg-{'a' * 40}\nx"])
def test_a_key_that_is_too_easy_or_none_is_not_admitted(text: str) -> None:
    store = MemoryStore()
    with pytest.raises(BadKey, match="pg-"):
        admit_key(store, text, tenant=T, name="given", at=1.0)
    assert list_keys(store) == []
