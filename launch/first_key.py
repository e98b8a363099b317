"""The API key that a service has before anyone could ask it for one: made by `up`, or given in a file."""

from __future__ import annotations

import time
from pathlib import Path

from polygraft.cluster.api_keys import OPERATOR, BadKey, admit_key, create_key, verify_key
from polygraft.cluster.model import ApiKey
from polygraft.cluster.service import write_private
from polygraft.cluster.settings import BadSettings
from polygraft.cluster.store.base import Store

_GIVEN = "given by api_key_file"


def make_local_key(store: Store, path: Path) -> None:
    """The local tenant's API key: made by the first start, made anew if the store does not know it."""
    if path.exists() and verify_key(store, path.read_text().strip()):
        return
    _, text = create_key(store, tenant=OPERATOR, name="made by polygraft up", at=time.time())
    write_private(path, text + "\n")


def admit_given_key(store: Store, file: Path) -> ApiKey:
    """The local tenant's key that an operator put into a file, such as a mounted Secret; another one that the file held
    before is revoked. Raises BadSettings."""
    try:
        return admit_key(store, file.read_text().strip(), tenant=OPERATOR, name=_GIVEN, at=time.time())
    except (OSError, UnicodeDecodeError, BadKey) as error:
        raise BadSettings(f"api_key_file: {file}: {error}") from None
