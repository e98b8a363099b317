"""API keys: made, checked, listed and revoked over the store, which holds only the SHA-256 of a key's text."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from secrets import token_urlsafe

from polygraft.cluster.model import ApiKey, ApiKeyId, TenantId
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, Write

PREFIX = "pg-"


def create_key(store: Store, *, tenant: TenantId, name: str, at: float) -> tuple[ApiKey, str]:
    """A new key and its text, which cannot be read again later."""
    text = f"{PREFIX}{token_urlsafe(32)}"
    digest = _digest(text)
    key = ApiKey(id=ApiKeyId(f"key-{digest[:16]}"), tenant=tenant, name=name, digest=digest, created_at=at)
    store.commit([Write(keys.api_key(digest), key, 0)])
    return key, text


def verify_key(store: Store, text: str) -> ApiKey | None:
    """The key with this text; None if there is none or it was revoked."""
    if not text.startswith(PREFIX):
        return None
    found = store.get(keys.api_key(_digest(text)))
    return found.value if found and found.value.revoked_at is None else None


def list_keys(store: Store, tenant: TenantId | None = None) -> list[ApiKey]:
    """The keys of the tenant, or of all, oldest first, revoked ones too."""
    found = [one.value for one in store.scan(keys.API_KEYS) if tenant in (None, one.value.tenant)]
    return sorted(found, key=lambda key: (key.created_at, key.id))


def revoke_key(store: Store, id: ApiKeyId, *, at: float) -> ApiKey | None:
    """The key, which is worth nothing from now on; None if there is no such key."""
    for found in store.scan(keys.API_KEYS):
        if found.value.id == id:
            revoked = found.value if found.value.revoked_at is not None else replace(found.value, revoked_at=at)
            store.commit([Write(found.key, revoked, found.version)])
            return revoked
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
