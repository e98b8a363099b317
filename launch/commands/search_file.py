"""What `polygraft search` reads: a YAML file with the data, the space, and how many trials."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, PositiveInt, ValidationError

from polygraft.cluster.client import Client
from polygraft.cluster.spec import read_request
from polygraft.cluster.validation import explain
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.text.plain_yaml import YamlError, read_yaml
from polygraft.launch.output import Failure, Status
from polygraft.tuning.objectives import Limit
from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.samplers.choose import SamplerName
from polygraft.tuning.spaces.request import AutoPeftSpace, SpaceRequest


class SearchFile(BaseModel):
    """A search over a `space` (`tuning/spaces/request.py`) on the backbone `model`, the service's own where it is not
    given; `hyperparameters` are those of every trial, as in `polygraft submit`, except peft and learning_rate."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    name: str
    training_file: Path
    validation_file: Path
    model: str | None = None
    trials: PositiveInt = 12
    concurrency: PositiveInt = 4
    startup: PositiveInt = 4
    sampler: SamplerName = "tpe"
    objectives: tuple[str, ...] = ("loss", "parameters")
    limits: dict[str, float] = {}
    seed: int = 0
    space: SpaceRequest = AutoPeftSpace()
    hyperparameters: dict[str, JsonValue] = {}

    def plan(
        self, client: Client, *, backbone: str, shape: ModelShape, uploaded: Mapping[str, str] | None = None
    ) -> SearchPlan:
        """The plan, its files uploaded but for those that are, by their digests in `uploaded`. Raises BadPlan,
        BadRequest, SpecError and ApiFailure."""

        def id_of(file: Path) -> str:
            known = (uploaded or {}).get(sha256(file.read_bytes()).hexdigest())
            return client.upload(file).id if known is None else known

        limits = tuple(Limit(name, most) for name, most in self.limits.items())
        asked = self.space
        if "parameters" in self.limits and asked.most is None:  # kept by construction, or refused at once
            asked = asked.model_copy(update={"most": int(self.limits["parameters"])})
        space = asked.space(shape)
        job: dict[str, JsonValue] = {
            "model": backbone,
            "training_file": id_of(self.training_file),
            "validation_file": id_of(self.validation_file),
            "method": {"type": "supervised", "supervised": {"hyperparameters": self.hyperparameters}},
        }
        return SearchPlan(
            name=self.name,
            space=space,
            job=read_request(job),
            trials=self.trials,
            concurrency=self.concurrency,
            startup=self.startup,
            model=self.sampler,
            minimise=self.objectives,
            limits=limits,
            seed=self.seed,
        )


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
    paths = {name: folder / getattr(wanted, name) for name in ("training_file", "validation_file")}
    for name, path in paths.items():
        if not path.is_file():
            raise Failure(f"{name}: {path} does not exist", Status.USAGE)
    return wanted.model_copy(update=paths)
