"""What `polygraft submit` asks for: a JSONL file and options, or a YAML file with the names of the API, options
winning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from polygraft.cluster.answers import RemoteDryRun
from polygraft.cluster.client import Client
from polygraft.cluster.spec import FineTuningRequest, Hyperparameters
from polygraft.grafts.text.plain_yaml import YamlError, read_yaml
from polygraft.launch.output import Failure, Status
from polygraft.launch.tsv import jsonl_of

_TRAINING = tuple(Hyperparameters.model_fields)
_TOP = tuple(
    name
    for name in FineTuningRequest.model_fields
    if name not in ("method", "hyperparameters", "integrations", "owner")
)
TYPE = "type"  # of the job's method
_FILES = ("training_file", "validation_file", "test_file")


@dataclass(frozen=True, slots=True)
class SubmitRequest:
    """Fields of the API by name; files are local paths, or ids of files uploaded before."""

    fields: Mapping[str, JsonValue]
    folder: Path

    def body(self, client: Client) -> dict[str, JsonValue]:
        """The request's body, its files uploaded."""
        top = {name: self.fields[name] for name in _TOP if name in self.fields}
        for name in _FILES:
            if name in top:
                top[name] = self._upload(client, name, str(top[name]))
        if "model" not in top:
            top["model"] = _backbone(client)
        training = {name: self.fields[name] for name in _TRAINING if name in self.fields}
        kind = str(self.fields.get(TYPE, "supervised"))
        return {**top, "method": {"type": kind, kind: {"hyperparameters": training}}}

    def dry_run(self, client: Client) -> RemoteDryRun:
        """What the job would be; files that were uploaded for the answer are deleted again."""
        body = self.body(client)
        try:
            return client.dry_run(body)
        finally:
            for name in _FILES:
                if body.get(name) != self.fields.get(name):
                    client.delete_file(str(body[name]))

    def _upload(self, client: Client, name: str, value: str) -> str:
        path = self.folder / value
        if not path.exists() and value.startswith("file-"):
            return value
        if not path.is_file():
            raise Failure(f"{name}: {path} does not exist", Status.USAGE)
        if path.suffix == ".tsv":
            return client.upload(jsonl_of(path), filename=f"{path.stem}.jsonl").id
        return client.upload(path).id


def read_request(file: Path, options: Mapping[str, JsonValue]) -> SubmitRequest:
    """Raises Failure that names the field and the choices."""
    if file.suffix not in (".yaml", ".yml"):
        return SubmitRequest({"training_file": str(file.absolute()), **_absolute(options)}, Path())
    try:
        content = read_yaml(file)
    except YamlError as error:
        raise Failure(f"{file}: {error}", Status.USAGE) from None
    if not isinstance(content, dict):
        raise Failure(f"{file}: expected field: value lines, found {content!r}", Status.USAGE)
    for name in content:
        if name not in (TYPE, *_TOP, *_TRAINING):
            choices = ", ".join(sorted((TYPE, *_TOP, *_TRAINING)))
            raise Failure(f"{file}: unknown field {name!r}; choices: {choices}", Status.USAGE)
    if "training_file" not in content:
        raise Failure(f"{file}: training_file is missing; give the path of a JSONL file", Status.USAGE)
    return SubmitRequest({**content, **_absolute(options)}, file.absolute().parent)


def _absolute(options: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Paths given as options are relative to where the command runs, not to the YAML file."""
    found = dict(options)
    for name in _FILES:
        if name in found:
            path = Path(str(found[name]))
            found[name] = str(path.absolute() if path.exists() or not path.name.startswith("file-") else path)
    return found


def _backbone(client: Client) -> str:
    """The service's backbone: the model without a parent."""
    return next(model.id for model in client.models() if model.parent is None)
