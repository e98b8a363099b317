"""API keys: made, checked, listed and revoked over the store, which holds only the SHA-256 of a key's text."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from secrets import token_urlsafe

from polygraft.cluster.model import ApiKey, ApiKeyId, TenantId
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, Write

PREFIX = "pg-"
OPERATOR = TenantId("local")  # whose keys may also change what all tenants share
SHORTEST = 32  # characters of a key that someone else made


class BadKey(ValueError):
    """A text that no key may have; the message does not repeat it."""


def create_key(store: Store, *, tenant: TenantId, name: str, at: float) -> tuple[ApiKey, str]:
    """A new key and its text, which cannot be read again later."""
    text = f"{PREFIX}{token_urlsafe(32)}"
    key = _key(text, tenant=tenant, name=name, at=at)
    store.commit([Write(keys.api_key(key.digest), key, 0)])
    return key, text


def admit_key(store: Store, text: str, *, tenant: TenantId, name: str, at: float) -> ApiKey:
    """The key with this text, which someone else made; written if the store does not have it. Keys that came under
    the same name before are revoked, and one that was revoked stays so. Raises BadKey."""
    if not text.startswith(PREFIX) or len(text) < SHORTEST or not text.isascii() or not text.isprintable():
        raise BadKey(f"it must begin with {PREFIX!r} and have at least {SHORTEST} characters, letters and digits")
    key = _key(text, tenant=tenant, name=name, at=at)
    found = store.get(keys.api_key(key.digest))
    for old in store.scan(keys.API_KEYS):
        same = old.value.tenant == tenant and old.value.name == name
        if same and old.value.digest != key.digest and old.value.revoked_at is None:
            store.commit([Write(old.key, replace(old.value, revoked_at=at), old.version)])
    if found is None:
        store.commit([Write(keys.api_key(key.digest), key, 0)])
    return key if found is None else found.value


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


def _key(text: str, *, tenant: TenantId, name: str, at: float) -> ApiKey:
    digest = _digest(text)
    return ApiKey(id=ApiKeyId(f"key-{digest[:16]}"), tenant=tenant, name=name, digest=digest, created_at=at)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
