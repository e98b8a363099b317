"""What a new fine-tuning job is checked for before it exists: its graft on this backbone, its files and examples."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from pydantic import JsonValue

from polygraft.cluster.ids import new_job_id
from polygraft.cluster.model import Graft, Job, JobSpec, Limits, TenantId
from polygraft.cluster.policy.budget import FROZEN_BYTES, STATE_BYTES, job_bytes, longest_sample, state_bytes
from polygraft.cluster.publish import UnknownModel, resolve
from polygraft.cluster.spec import BadRequest, FineTuningRequest, read_request
from polygraft.cluster.states import Reason
from polygraft.cluster.validation import shown
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.formats.native import described
from polygraft.grafts.formats.peft_config import asked_for
from polygraft.grafts.grammar import check_backbone, learning_rate, parse, pinned
from polygraft.grafts.sources import check
from polygraft.grafts.spec import SpecError
from polygraft.grafts.text import jsonl
from polygraft.serving.http.context import Api
from polygraft.serving.http.errors import bad_request, not_found
from polygraft.serving.http.files import find_file

_PEFT = "method.supervised.hyperparameters.peft"
_MAX_LENGTH = "method.supervised.hyperparameters.max_length"
_CHECK_S = 5.0  # how long a request may wait for its examples; the pack's worker checks all of them again


def new_job(api: Api, tenant: TenantId, body: JsonValue) -> Job:
    """The job that `body` asks for. Raises ApiError 400 naming the field, 404 for a model or file that is not there."""
    try:
        request = read_request(body)
    except BadRequest as error:
        raise bad_request(str(error), param=error.param, code="invalid_value") from None
    if request.model != api.backbone:
        raise not_found("model", request.model, param="model")
    spec = request.to_spec()
    try:
        asked = request.graft if request.graft is not None else asked_for(spec.peft, api.shape, api.stock)
        check_backbone(asked, quantised=api.quantised)
        graft = BoundGraft(asked, api.shape)
        sizes = graft.parameters, graft.frozen
        spec = replace(spec, peft=_over_others(api, tenant, spec.peft, graft))
    except SpecError as error:
        raise bad_request(f"{_PEFT}: {error}", param=_PEFT, code="invalid_value") from None
    _check_memory(api.pack, spec.peft, sizes)
    spec = replace(spec, max_length=_length_limit(api, spec.max_length, graft))
    if spec.learning_rate is None:
        rate = learning_rate(graft.spec) * spec.learning_rate_multiplier
        spec = replace(spec, learning_rate=rate, learning_rate_multiplier=1.0)
    for param, file in (("training_file", spec.training_file), ("validation_file", spec.validation_file)):
        if file is not None:
            _check_examples(api, api.blob(find_file(api, tenant, file, param=param).value), spec, param)
    return _job(api, tenant, request, spec, sizes)


def _over_others(api: Api, tenant: TenantId, peft: str, graft: BoundGraft) -> str:
    """`peft` with the versions of the grafts that it is made over, which must give what it takes of them."""
    found: dict[str, Graft] = {}
    bound: dict[str, BoundGraft] = {}
    for name in graft.spec.sources:
        try:
            source = resolve(api.store, tenant, name, api.backbone)
        except UnknownModel:
            source = None
        if source is None:
            raise not_found("model", name, param=_PEFT)
        if source.backbone_fingerprint != api.fingerprint:
            raise SpecError(f"of: {name!r} has grown on another backbone")
        found[name] = source
        try:
            bound[name] = BoundGraft(described(api.folders.grafts / source.id), api.shape)
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


def _length_limit(api: Api, asked: int | None, graft: BoundGraft) -> int | None:
    """After how many tokens an example is cut: by default what the backbone and a pack's memory have room for."""
    try:
        limit = api.shape.length_limit(asked, graft.context_length)
    except SpecError as error:
        raise bad_request(str(error), param=_MAX_LENGTH, code="invalid_value") from None
    longest = longest_sample(api.pack)
    if asked is not None or longest is None:
        return limit
    room = max(2, longest - graft.virtual_length)
    return room if limit is None else min(limit, room)


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


def _check_examples(api: Api, path: Path, spec: JobSpec, param: str) -> None:
    """Raise ApiError 400 for an example of which max_length leaves nothing to learn, naming its line."""
    until = time.monotonic() + _CHECK_S
    try:
        for example in jsonl.read(path, jsonl.Limits(line_bytes=api.limits.line_bytes)):
            api.tokeniser.encode_example(example, spec.max_length)
            if time.monotonic() > until:
                return
    except FileNotFoundError:
        file = spec.training_file if param == "training_file" else spec.validation_file
        raise bad_request(f"{param}: the content of {shown(file)} is gone; upload it again", param=param) from None
    except jsonl.DataError as error:
        raise bad_request(f"{param}: {error}", param=param, code="invalid_file") from None
