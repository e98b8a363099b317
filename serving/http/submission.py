"""What a new fine-tuning job is checked for before it exists: its graft on this backbone, its files and examples."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from pydantic import JsonValue

from polygraft.cluster.ids import new_job_id
from polygraft.cluster.model import FileId, Graft, Job, JobId, JobSpec, Limits, TenantId
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
from polygraft.grafts.formats.description import described
from polygraft.grafts.formats.heads import head_over, label_of
from polygraft.grafts.formats.peft_config import asked_for
from polygraft.grafts.grammar import check_backbone, learning_rate, parse, pinned
from polygraft.grafts.head import Head
from polygraft.grafts.sources import check
from polygraft.grafts.spec import SpecError
from polygraft.grafts.text import jsonl
from polygraft.grafts.text.tokenise import Tokeniser, Tokens
from polygraft.kernels.kv.cost import SCORE_BLOCK
from polygraft.serving.http.context import Api
from polygraft.serving.http.errors import ApiError, bad_request, not_found
from polygraft.serving.http.files import find_file
from polygraft.serving.http.known import KnownBackbone
from polygraft.serving.http.named import backbone_named

_ITEMSIZE = 2  # bytes of a number in bf16, the narrowest that a pack computes in; SCORE_BLOCK is the least, too
_STATE = (  # what a job must have in common with the one that it goes on from
    *("kind", "backbone", "training_file", "validation_file", "peft", "epochs", "batch_size", "optimizer"),
    *("max_length", "dropout", "seed"),
)
_CHECK_S = 5.0  # how long a request may wait for its examples; the pack's worker checks all of them again


@dataclass(frozen=True, slots=True)
class Reading:
    """Conversations, or with a head labelled texts, cut after `limit` tokens (None: never)."""

    tokeniser: Tokeniser
    head: Head | None
    limit: int | None

    def tokens(self, path: Path, limits: jsonl.Limits, *, judged: bool) -> Iterator[tuple[int, Tokens]]:
        """The tokens of each example with its line, those of other choices checked where they are `judged`. Raises
        DataError."""
        if self.head is not None:
            for text in jsonl.read_labelled_texts(path, limits):
                label_of(self.head, text)
                yield text.line, self.tokeniser.encode_labelled(text, self.limit, last=self.head.reads_last)
            return
        for example in jsonl.read(path, limits):
            tokens = self.tokeniser.encode_example(example, self.limit)
            if judged:
                self.tokeniser.encode_others(example, self.limit)
            yield example.line, tokens


@dataclass(frozen=True, slots=True)
class Submission:
    """A job, and how its examples are read where its pack has all the room there may be. A pack that has less, since
    it computes in float32, cuts the examples of a job that does not say there."""

    job: Job
    reading: Reading


def new_job(api: Api, tenant: TenantId, body: JsonValue) -> Submission:
    """The job that `body` asks for. Raises ApiError 400 naming the field, 404 for a model or file that is not there."""
    try:
        request = read_request(body)
    except BadRequest as error:
        raise bad_request(str(error), param=error.param, code="invalid_value") from None
    backbone = backbone_named(api, request.model)
    if request.suffix in api.backbones.names:
        raise bad_request(f"suffix: {request.suffix!r} is the name of a backbone; choose another", param="suffix")
    spec, classifies = request.to_spec(), request.kind == "classification"
    if not classifies and not backbone.shape.causal:
        message = f"method: {backbone.shape.sees}; a job on {backbone.name} is of type 'classification'"
        raise bad_request(message, param="method", code="invalid_value")
    peft = f"method.{request.kind}.hyperparameters.peft"
    try:
        asked = request.graft or asked_for(spec.peft, backbone.shape, backbone.files, classifies=classifies)
        check_backbone(asked, quantised=backbone.quantised)
        graft = BoundGraft(
            replace(asked, head=_head(api, tenant, spec, backbone) if classifies else None), backbone.shape
        )
        elastic.check(graft.spec)
        sizes = graft.parameters, graft.frozen
        spec = replace(spec, peft=_over_others(api, tenant, backbone, spec.peft, graft, peft))
    except SpecError as error:
        raise bad_request(f"{peft}: {error}", param=peft, code="invalid_value") from None
    pack = api.pack(backbone.record)
    _check_memory(pack, spec.peft, sizes, peft)
    room = ExampleRoom(StepCost(graft, _ITEMSIZE, SCORE_BLOCK), pack.pack_bytes) if pack.pack_bytes else None
    limit = _length_limit(backbone, spec, graft, room)
    if spec.learning_rate is None:
        rate = learning_rate(graft.spec) * spec.learning_rate_multiplier
        spec = replace(spec, learning_rate=rate, learning_rate_multiplier=1.0)
    for param, file in files_of(spec).items():
        if file is not None:
            path = api.blob(find_file(api, tenant, file, param=param).value)
            _check_examples(api, backbone, Reading(backbone.tokeniser, graft.spec.head, limit), path, room, param)
    _check_rung(api, tenant, spec)
    return Submission(_job(api, tenant, request, spec, sizes), Reading(backbone.tokeniser, graft.spec.head, limit))


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


def files_of(spec: JobSpec) -> Mapping[str, FileId | None]:
    """By the field that names them: the one that is trained on, and those that are judged on."""
    return {
        "training_file": spec.training_file,
        "validation_file": spec.validation_file,
        "test_file": spec.test_file,
    }


def _head(api: Api, tenant: TenantId, spec: JobSpec, backbone: KnownBackbone) -> Head:
    """The classifier over the labels of the training file. Raises ApiError 400 for a file that has none."""
    path = api.blob(find_file(api, tenant, spec.training_file, param="training_file").value)
    try:
        return head_over(path, backbone.shape)
    except FileNotFoundError:
        raise _gone("training_file", path) from None
    except jsonl.DataError as error:
        raise bad_request(f"training_file: {error}", param="training_file", code="invalid_file") from None


def _over_others(api: Api, tenant: TenantId, backbone: KnownBackbone, peft: str, graft: BoundGraft, param: str) -> str:
    """`peft` with the versions of the grafts that it is made over, which must give what it takes of them."""
    found: dict[str, Graft] = {}
    bound: dict[str, BoundGraft] = {}
    for name in graft.spec.sources:
        try:
            source = resolve(api.store, tenant, name)
        except UnknownModel:
            raise not_found("model", name, param=param) from None
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


def _length_limit(backbone: KnownBackbone, spec: JobSpec, graft: BoundGraft, room: ExampleRoom | None) -> int | None:
    """After how many tokens an example is cut: by default what the backbone and a pack's memory have room for. Where
    that is no example at all, `_check_examples` says why."""
    asked, param = spec.max_length, f"method.{spec.kind}.hyperparameters.max_length"
    try:
        limit = backbone.shape.length_limit(asked, graft.context_length)
    except SpecError as error:
        raise bad_request(str(error), param=param, code="invalid_value") from None
    if asked is not None or room is None or (longest := room.longest) < 2:
        return limit
    return min(limit or longest, longest)


def _check_memory(pack: Limits, peft: str, sizes: tuple[int, int], param: str) -> None:
    """Raise ApiError 400 for a graft that not even an empty pack could hold in training."""
    (trained, kept), room = sizes, job_bytes(pack)
    needs = state_bytes(trained, kept)
    if room is not None and needs > room:
        each = f"{STATE_BYTES} bytes each for weight, gradient and moments, {kept:,} others {FROZEN_BYTES}"
        raise bad_request(
            f"{param}: {shown(peft)} needs {needs:,} bytes in training, a pack has {max(0, room):,}: {trained:,} "
            f"trained numbers take {each}; choose a smaller graft, or it at fewer projections (at=) or layers (@)",
            param=param,
            code="invalid_value",
        )


def _check_examples(
    api: Api, backbone: KnownBackbone, reading: Reading, path: Path, room: ExampleRoom | None, param: str
) -> None:
    """Raise ApiError 400 for an example of which the limit leaves nothing to learn, or that no pack has room for,
    naming its line. A file that was read before without a fault is not read again."""
    tokens_by = backbone.fingerprint, reading.tokeniser.fingerprint
    how, longest = (*tokens_by, reading.head, reading.limit, param == "training_file"), 0
    try:
        known = api.checked.longest(path, how)
    except FileNotFoundError:
        raise _gone(param, path) from None
    if known is not None and (room is None or room.refusal(known) is None):
        return
    until = time.monotonic() + _CHECK_S
    for line, tokens in encoded(api, reading, path, param):
        if room is not None and (why := room.refusal(len(tokens.ids))) is not None:
            raise bad_request(f"{param}: line {line} {why}", param=param, code="invalid_file")
        longest = max(longest, len(tokens.ids))
        if time.monotonic() > until:
            break
    api.checked.note(path, how, longest)


def encoded(api: Api, reading: Reading, path: Path, param: str) -> Iterator[tuple[int, Tokens]]:
    """The tokens of each example with its line. Raises ApiError 400 for one that cannot be used, and for content that
    is not there, or not any more."""
    try:
        limits = jsonl.Limits(line_bytes=api.limits.line_bytes)
        yield from reading.tokens(path, limits, judged=param != "training_file")
    except FileNotFoundError:
        raise _gone(param, path) from None
    except jsonl.DataError as error:
        raise bad_request(f"{param}: {error}", param=param, code="invalid_file") from None


def _gone(param: str, path: Path) -> ApiError:
    return bad_request(f"{param}: the content of {shown(path.stem)} is gone; upload it again", param=param)
