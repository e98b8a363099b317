"""What `polygraft search` reads: a YAML file with the data, the space, and how many trials; or the data alone."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import JsonValue, ValidationError

from polygraft.cluster.client import Client
from polygraft.cluster.validation import explain
from polygraft.grafts.text.plain_yaml import YamlError, read_yaml
from polygraft.launch.output import Failure, Status
from polygraft.tuning.budget import EXAMPLES, HELD_OUT, SHARE, BadBudget, Chosen, chosen
from polygraft.tuning.request import SearchOptions

_FILES = ("training_file", "validation_file", "test_file")


class SearchFile(SearchOptions):
    """A search whose files lie beside it."""

    training_file: Path
    validation_file: Path
    test_file: Path | None = None

    def body(self, client: Client) -> dict[str, JsonValue]:
        """The request for POST /v1/searches, its files uploaded. Raises ApiFailure."""
        body: dict[str, JsonValue] = self.model_dump(mode="json", exclude_unset=True)
        named = [name for name in _FILES if getattr(self, name) is not None]
        files = {name: client.upload(getattr(self, name)).id for name in named}
        return {**body, **files}


def read_search_file(file: Path) -> SearchFile:
    """Raises Failure that names the field and the choices."""
    try:
        content = read_yaml(file)
        wanted = SearchFile.model_validate(content)
    except YamlError as error:
        raise Failure(f"{file}: {error}", Status.USAGE) from None
    except ValidationError as error:
        raise Failure(f"{file}: {explain(error, SearchFile)[1]}", Status.USAGE) from None
    folder = file.absolute().parent
    paths = {name: folder / getattr(wanted, name) for name in _FILES if getattr(wanted, name) is not None}
    for name, path in paths.items():
        if not path.is_file():
            raise Failure(f"{name}: {path} does not exist", Status.USAGE)
    return wanted.model_copy(update=paths)


def within(file: Path, budget: str, client: Client) -> tuple[dict[str, JsonValue], Chosen]:
    """A request for nothing but examples and a budget, the examples split and uploaded, and what was chosen. Raises
    Failure and ApiFailure."""
    lines = [line for line in file.read_bytes().splitlines() if line.strip()]
    held_out = min(HELD_OUT, max(1, int(SHARE * len(lines))))
    if len(lines) <= held_out:
        raise Failure(f"{file}: {len(lines)} examples are too few to hold some out; give at least 2", Status.USAGE)
    try:
        plan = chosen(budget, len(lines) - held_out)
    except BadBudget as error:
        raise Failure(f"--{error}", Status.USAGE) from None
    every = len(lines) // held_out  # spread over the file, whose order may mean something
    kept = {index * every for index in range(held_out)}
    train = [line for index, line in enumerate(lines) if index not in kept][:EXAMPLES]
    tried = [line for index, line in enumerate(lines) if index in kept]
    name = "".join(c if c.isalnum() and c.isascii() else "-" for c in file.stem.lower())[:27].strip("-") or "search"
    body: dict[str, JsonValue] = {
        "name": f"{name}-search",
        "training_file": client.upload(b"\n".join(train) + b"\n", filename=file.name).id,
        "validation_file": client.upload(b"\n".join(tried) + b"\n", filename=f"held-out-{file.name}").id,
        **plan.options,
    }
    return json.loads(json.dumps(body)), plan
