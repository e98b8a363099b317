"""How commands reach a Redis or Valkey server: pooled connections, scripts, waiting for its disk, failures."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import cast

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from polygraft.cluster.store.base import StoreUnavailable, WriteRefused

_LOG = logging.getLogger(__name__)
TIMEOUT_S = 5.0  # a server that is silent for longer is down
CONNECT_S = 2.0
REFUSED_S = 0.5  # until a patient one sends again what was refused
_REFUSED = ("MISCONF", "OOM", "NOREPLICAS")
_CANNOT_WRITE = ("READONLY", "WAITAOF cannot", "LOADING", "MASTERDOWN")

Argument = str | bytes | int | float


class Wire:
    """Every command takes a connection of the pool and gives it back, a blocking one too, so that threads never meet.

    Nothing is sent twice, as a write whose answer is lost may have happened, but for what the server refused to write:
    a `patient` wire sends that until it is taken. Raises StoreUnavailable, and WriteRefused if it is not patient.
    """

    def __init__(self, url: str, *, patient: bool = False) -> None:
        self._patient = patient
        self._redis = redis.Redis.from_url(
            url,
            protocol=2,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=CONNECT_S,
            retry=Retry(NoBackoff(), 0),
            max_connections=1000,  # each blocked reader holds one
        )
        self._checked = False
        self._waits = False

    def call(self, *command: Argument) -> object:
        def send() -> object:
            with _reached():
                return self._redis.execute_command(*command)  # type: ignore[no-untyped-call]

        return self._patiently(send)

    def calls(self, commands: Sequence[Sequence[Argument]]) -> list[object]:
        """Answers of commands that travel together, in their order, not atomically."""
        with _reached():
            pipeline = self._redis.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
            return cast(list[object], pipeline.execute())

    def script(self, name: str, names: Sequence[str], arguments: Sequence[Argument]) -> object:
        """The answer of store/lua/<name>.lua, once what it wrote is on disk."""
        text, digest = _script(name)
        command = ("EVALSHA", digest, len(names), *names, *arguments)
        try:
            return self.durably(*command)
        except exceptions.NoScriptError:  # the server is new or was restarted
            self.call("SCRIPT", "LOAD", text)
            return self.durably(*command)

    def durably(self, *command: Argument) -> object:
        """The answer of a write, once it and all writes before it are on disk."""
        self._check_durability()
        if not self._waits:
            return self.call(*command)  # appendfsync always: the answer comes after the disk
        return self._patiently(lambda: self._awaited(command))

    def close(self) -> None:
        self._redis.close()

    def _patiently(self, send: Callable[[], object]) -> object:
        refused = False
        while True:
            try:
                return send()
            except WriteRefused as error:
                if not self._patient:
                    raise
                if not refused:
                    _LOG.warning("%s; waiting until it is taken", error)
                refused = True
            time.sleep(REFUSED_S)

    def _awaited(self, command: Sequence[Argument]) -> object:
        with _reached():
            # One connection: WAITAOF waits for the writes of its own connection only.
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
            pipeline.execute_command("WAITAOF", 1, 0, round((TIMEOUT_S - 1) * 1000))  # type: ignore[no-untyped-call]
            answer, waited = pipeline.execute(raise_on_error=False)
            for one in (answer, waited):
                if isinstance(one, Exception):
                    raise one
            if cast(list[int], waited)[0] < 1:
                raise StoreUnavailable(f"the store's disk did not take a write within {TIMEOUT_S - 1:.0f} s")
            return cast(object, answer)

    def _check_durability(self) -> None:
        """Refuse a server that would acknowledge what it may lose."""
        if self._checked:
            return
        try:
            self.call("WAITAOF", 0, 0, 0)
            waits = True
        except exceptions.ResponseError:  # unknown command
            waits = False
        try:
            found = cast(list[bytes], self.call("CONFIG", "GET", "append*"))
        except exceptions.ResponseError:  # forbidden; WAITAOF itself fails where the file is off
            found = []
        config = {found[i].decode(): found[i + 1].decode() for i in range(0, len(found), 2)}
        if config.get("appendonly") == "no":
            raise StoreUnavailable("the store would lose acknowledged writes; run its server with appendonly yes")
        if not waits and config.get("appendfsync") != "always":
            needed = "appendonly yes and appendfsync always"
            raise StoreUnavailable(f"the store's server has no WAITAOF; run it with {needed}")
        self._waits = waits
        self._checked = True


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
        raise StoreUnavailable(f"the store does not answer: {error}") from error
    except exceptions.NoScriptError:
        raise
    except exceptions.ResponseError as error:
        if any(word in str(error) for word in _REFUSED):
            raise WriteRefused(f"the store refuses to write: {error}") from error
        if any(word in str(error) for word in _CANNOT_WRITE):
            raise StoreUnavailable(f"the store cannot write: {error}") from error
        raise


@cache
def _script(name: str) -> tuple[str, str]:
    text = (files("polygraft.cluster.store") / "lua" / f"{name}.lua").read_text(encoding="utf-8")
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
