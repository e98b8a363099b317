"""One real server for all tests of the store; each test has a prefix of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from polygraft.cluster.store.embedded import EmbeddedServer


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path_factory.mktemp("valkey")) as server:
        yield server
