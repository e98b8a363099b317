"""What a new fine-tuning job is checked for before it exists: its graft on this backbone, its files and examples."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from pydantic import JsonValue

from polygraft.cluster.ids import new_job_id
from polygraft.cluster.model import Graft, Job, JobId, JobSpec, Limits, TenantId
from polygraft.cluster.policy.budget import FROZEN_BYTES, STATE_BYTES, ExampleRoom, job_bytes, state_bytes
from polygraft.cluster.publish import UnknownModel, resolve
from polygraft.cluster.spec import BadRequest, FineTuningRequest, read_request
from polygraft.cluster.states import JobState, Reason
from polygraft.cluster.store import keys
from polygraft.cluster.validation import shown
from polygraft.grafts import elastic
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.cost import StepCost
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.formats.native import described
from polygraft.grafts.formats.peft_config import asked_for
from polygraft.grafts.grammar import check_backbone, learning_rate, parse, pinned
from polygraft.grafts.sources import check
from polygraft.grafts.spec import SpecError
from polygraft.grafts.text import jsonl
from polygraft.grafts.text.tokenise import Tokeniser, Tokens
from polygraft.kernels.kv.cost import SCORE_BLOCK
from polygraft.serving.http.context import Api
from polygraft.serving.http.errors import bad_request, not_found
from polygraft.serving.http.files import find_file
from polygraft.serving.http.known import KnownBackbone
from polygraft.serving.http.named import backbone_named

_PEFT = "method.supervised.hyperparameters.peft"
_MAX_LENGTH = "method.supervised.hyperparameters.max_length"
_ITEMSIZE = 2  # bytes of a number in bf16, the narrowest that a pack computes in; SCORE_BLOCK is the least, too
_STATE = (  # what a job must have in common with the one that it goes on from
    *("backbone", "training_file", "validation_file", "peft", "epochs", "batch_size", "optimizer"),
    *("max_length", "dropout", "seed"),
)
_CHECK_S = 5.0  # how long a request may wait for its examples; the pack's worker checks all of them again


@dataclass(frozen=True, slots=True)
class Submission:
    """A job, and after how many tokens its examples are cut (None: never) where its pack has all the room there may be.
    A pack that has less, since it computes in float32, cuts the examples of a job that does not say there."""

    job: Job
    max_length: int | None


def new_job(api: Api, tenant: TenantId, body: JsonValue) -> Submission:
    """The job that `body` asks for. Raises ApiError 400 naming the field, 404 for a model or file that is not there."""
    try:
        request = read_request(body)
    except BadRequest as error:
        raise bad_request(str(error), param=error.param, code="invalid_value") from None
    backbone = backbone_named(api, request.model)
    if request.suffix in api.backbones.names:
        raise bad_request(f"suffix: {request.suffix!r} is the name of a backbone; choose another", param="suffix")
    spec = request.to_spec()
    try:
        asked = request.graft if request.graft is not None else asked_for(spec.peft, backbone.shape, backbone.stock)
        check_backbone(asked, quantised=backbone.quantised)
        elastic.check(asked)
        graft = BoundGraft(asked, backbone.shape)
        sizes = graft.parameters, graft.frozen
        spec = replace(spec, peft=_over_others(api, tenant, backbone, spec.peft, graft))
    except SpecError as error:
        raise bad_request(f"{_PEFT}: {error}", param=_PEFT, code="invalid_value") from None
    _check_memory(api.pack, spec.peft, sizes)
    room = ExampleRoom(StepCost(graft, _ITEMSIZE, SCORE_BLOCK), api.pack.pack_bytes) if api.pack.pack_bytes else None
    limit = _length_limit(backbone, spec.max_length, graft, room)
    if spec.learning_rate is None:
        rate = learning_rate(graft.spec) * spec.learning_rate_multiplier
        spec = replace(spec, learning_rate=rate, learning_rate_multiplier=1.0)
    for param, file in (("training_file", spec.training_file), ("validation_file", spec.validation_file)):
        if file is not None:
            path = api.blob(find_file(api, tenant, file, param=param).value)
            _check_examples(api, backbone.tokeniser, path, limit, room, param)
    _check_rung(api, tenant, spec)
    return Submission(_job(api, tenant, request, spec, sizes), limit)


def _check_rung(api: Api, tenant: TenantId, spec: JobSpec) -> None:
    """Raise ApiError 404 for a job to go on from that is not there, 400 for one that did not end at an earlier rung, or
    that was trained otherwise in anything that decides what its state means."""
    if spec.rung is None or spec.rung.after is None:
        return
    found = api.store.get(keys.job(JobId(spec.rung.after)))
    if found is None or found.value.tenant != tenant:
        raise not_found("job", spec.rung.after, param="rung.after")
    source, until = found.value, found.value.spec.rung.until if found.value.spec.rung else 1.0
    if source.state is not JobState.SUCCEEDED or until >= spec.rung.until:
        ended = f"{source.state.value}, its steps end at {until:g} of all"
        message = f"rung.after: {source.id} is {ended}; give one that succeeded before {spec.rung.until:g} of them"
        raise bad_request(message, param="rung.after", code="invalid_value")
    for field in fields(JobSpec):
        mine, its = getattr(spec, field.name), getattr(source.spec, field.name)
        if field.name in _STATE and mine != its:
            message = f"{field.name}: {mine!r} is not {its!r}, which {source.id} was trained with (rung.after)"
            raise bad_request(message, param=field.name, code="invalid_value")


def _over_others(api: Api, tenant: TenantId, backbone: KnownBackbone, peft: str, graft: BoundGraft) -> str:
    """`peft` with the versions of the grafts that it is made over, which must give what it takes of them."""
    found: dict[str, Graft] = {}
    bound: dict[str, BoundGraft] = {}
    for name in graft.spec.sources:
        try:
            source = resolve(api.store, tenant, name)
        except UnknownModel:
            raise not_found("model", name, param=_PEFT) from None
        if source.backbone_fingerprint != backbone.fingerprint:
            raise SpecError(f"of: {name!r} has grown on another backbone than {backbone.name}")
        found[name] = source
        try:
            bound[name] = BoundGraft(described(api.folders.grafts / source.id), backbone.shape)
        except FormatError:
            raise SpecError(f"of: the files of {name!r} are missing or damaged") from None
    check(graft, bound)
    if not found:
        return peft
    text = pinned(peft, {name: one.model for name, one in found.items()})
    parse(text)  # as the pack will: it is longer, and two names may mean one version
    return text


def _job(api: Api, tenant: TenantId, request: FineTuningRequest, spec: JobSpec, sizes: tuple[int, int]) -> Job:
    now, (trained, kept) = api.clock(), sizes
    owner = request.owner
    return Job(
        id=new_job_id(),
        tenant=tenant,
        spec=spec,
        created_at=now,
        parameters=trained,
        frozen=kept,
        owner=owner.name if owner else None,
        lease_until=now + owner.lease_s if owner else None,
        reason=Reason.TURN,
    )


def _length_limit(
    backbone: KnownBackbone, asked: int | None, graft: BoundGraft, room: ExampleRoom | None
) -> int | None:
    """After how many tokens an example is cut: by default what the backbone and a pack's memory have room for. Where
    that is no example at all, `_check_examples` says why."""
    try:
        limit = backbone.shape.length_limit(asked, graft.context_length)
    except SpecError as error:
        raise bad_request(str(error), param=_MAX_LENGTH, code="invalid_value") from None
    if asked is not None or room is None or (longest := room.longest) < 2:
        return limit
    return min(limit or longest, longest)


def _check_memory(pack: Limits, peft: str, sizes: tuple[int, int]) -> None:
    """Raise ApiError 400 for a graft that not even an empty pack could hold in training."""
    (trained, kept), room = sizes, job_bytes(pack)
    needs = state_bytes(trained, kept)
    if room is not None and needs > room:
        each = f"{STATE_BYTES} bytes each for weight, gradient and moments, {kept:,} others {FROZEN_BYTES}"
        raise bad_request(
            f"{_PEFT}: {shown(peft)} needs {needs:,} bytes in training, a pack has {max(0, room):,}: {trained:,} "
            f"trained numbers take {each}; choose a smaller graft, or it at fewer projections (at=) or layers (@)",
            param=_PEFT,
            code="invalid_value",
        )


def _check_examples(
    api: Api, tokeniser: Tokeniser, path: Path, limit: int | None, room: ExampleRoom | None, param: str
) -> None:
    """Raise ApiError 400 for an example of which the limit leaves nothing to learn, or that no pack has room for,
    naming its line."""
    until = time.monotonic() + _CHECK_S
    for line, tokens in encoded(api, tokeniser, path, limit, param):
        if room is not None and (why := room.refusal(len(tokens.ids))) is not None:
            raise bad_request(f"{param}: line {line} {why}", param=param, code="invalid_file")
        if time.monotonic() > until:
            return


def encoded(api: Api, tokeniser: Tokeniser, path: Path, limit: int | None, param: str) -> Iterator[tuple[int, Tokens]]:
    """The tokens of each example with its line. Raises ApiError 400 for one that cannot be used, and for content that
    is not there, or not any more."""
    try:
        for example in jsonl.read(path, jsonl.Limits(line_bytes=api.limits.line_bytes)):
            yield example.line, tokeniser.encode_example(example, limit)
    except FileNotFoundError:
        raise bad_request(f"{param}: the content of {shown(path.stem)} is gone; upload it again", param=param) from None
    except jsonl.DataError as error:
        raise bad_request(f"{param}: {error}", param=param, code="invalid_file") from None
