"""The study's record in the store, which is the truth about a search: a driver that starts again goes on from it.

Every ask and every tell is committed before it has any effect, at the version this writer saw last; so of two drivers
of one study the second to write is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import JsonValue, TypeAdapter, ValidationError

from polygraft.cluster.model import Study as Record
from polygraft.cluster.model import StudyId, TenantId
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, Versioned, Write
from polygraft.grafts.methods.registry import find
from polygraft.grafts.spec import SpecError
from polygraft.tuning.finals import Final
from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.spaces.autopeft import halved
from polygraft.tuning.study import Study, Trial


class BadRecord(ValueError):
    """A study's record that cannot be gone on with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """What the body of a study's record says; `finals` and the trial that was `chosen` come after the last trial."""

    plan: SearchPlan
    trials: tuple[Trial, ...] = ()
    finals: tuple[Final, ...] = ()
    chosen: int | None = None
    schema_version: Literal[3] = 3


def encode(record: StudyRecord) -> str:
    return _ADAPTER.dump_json(record, exclude_unset=True).decode()


def decode(text: str) -> StudyRecord:
    """Inverse of `encode`. Raises BadRecord naming the first bad field."""
    try:
        return _ADAPTER.validate_json(_upgraded(text))
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRecord(f"study: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def open_study(
    store: Store, study: StudyId, plan: SearchPlan, *, tenant: TenantId, clock: Callable[[], float]
) -> Study:
    """The study as its record has it, made now if there is none. Its asks and tells raise what `Store.commit` raises.

    Raises BadRecord when the record is another tenant's or of another plan.
    """
    found = store.get(keys.study(study))
    if found is None:
        now = clock()
        body = encode(StudyRecord(plan=plan))
        value = Record(id=study, tenant=tenant, name=plan.name, created_at=now, updated_at=now, body=body)
        version = store.commit([Write(keys.study(study), value, 0)]).version
        found = Versioned(keys.study(study), value, version)
    if found.value.tenant != tenant:
        raise BadRecord(f"study: {study} is not one of {tenant}'s")
    record = decode(found.value.body)
    if record.plan != plan:
        raise BadRecord(f"study: {study} was begun with another plan; go on with that one, or begin a new study")
    return Study(
        plan.space,
        plan.objectives,
        plan.sampler,
        limits=plan.limits,
        hope=plan.hope,
        trials=record.trials,
        part=plan.part,
        keep=_Keeper(store, found, plan, clock),
    )


class _Keeper:
    """Writes the trials, each time over the version it wrote before."""

    def __init__(self, store: Store, last: Versioned[Record], plan: SearchPlan, clock: Callable[[], float]) -> None:
        self._store = store
        self._last = last
        self._plan = plan
        self._clock = clock

    def __call__(self, trials: tuple[Trial, ...]) -> None:
        body = encode(StudyRecord(plan=self._plan, trials=trials))
        value = replace(self._last.value, updated_at=self._clock(), body=body)
        version = self._store.commit([Write(self._last.key, value, self._last.version)]).version
        self._last = Versioned(self._last.key, value, version)


def _upgraded(text: str) -> str:
    """A record of schema 1, whose only spaces were methods with one size each, or of schema 2, which had for each trial
    all that had been told, as one of schema 3."""
    try:
        record = json.loads(text)
        version = record.get("schema_version")
        if version not in (1, 2):
            return text
        if version == 1:
            space = record["plan"]["space"]
            terms = [
                {"name": old["method"], "method": old["method"], "searched": [_sizes(**old)], "off": True}
                for old in space.pop("methods")
            ]
            low, high = space["learning_rate"]
            space |= {"kind": "union", "terms": terms, "learning_rate": {"low": low, "high": high}}
        for trial in record["trials"]:
            trial["unseen"] = sorted(set(range(trial["number"])) - set(trial.pop("seen", ())))
        return json.dumps(record | {"schema_version": 3})
    except (AttributeError, KeyError, TypeError, ValueError, SpecError):
        return text  # which is then refused with its first bad field


def _sizes(method: str, largest: int) -> dict[str, JsonValue]:
    return {"argument": find(method).positional(0), "values": list(halved(largest))}


_ADAPTER: TypeAdapter[StudyRecord] = TypeAdapter(StudyRecord)
