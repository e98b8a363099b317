"""What unfinished jobs and running searches still need, so that it is not taken away under them."""

from __future__ import annotations

from polygraft.cluster.model import JobSpec, Search, TenantId
from polygraft.cluster.store import keys
from polygraft.cluster.told import Told
from polygraft.grafts.grammar import parse
from polygraft.grafts.methods import configs
from polygraft.serving.http.context import Api


def needed_by(api: Api, tenant: TenantId, thing: str) -> str | None:
    """Who of the tenant's needs the file, or the version `name@n` of a graft."""
    for job in api.store.newest(keys.unfinished_jobs_of(tenant)):
        if _needs(job.value.spec, thing):
            return f"job {job.value.id}"
    for search in api.store.newest(keys.running_searches_of(tenant)):
        if thing in told(api, search.value).needs:
            return f"search {search.value.id}"
    return None


def searches_on(api: Api, backbone: str) -> int:
    """How many running searches, of all tenants, have jobs there."""
    return sum(
        told(api, search.value).job.get("model") == backbone for search in api.store.newest(keys.RUNNING_SEARCHES)
    )


def told(api: Api, search: Search) -> Told:
    """What its study's record says."""
    found = api.store.get(keys.study(search.id))
    return Told() if found is None else api.desk.told(found.value.body)


def _needs(spec: JobSpec, thing: str) -> bool:
    if "@" not in thing:
        return thing in (spec.training_file, spec.validation_file, spec.test_file)
    return thing in spec.peft and not configs.is_config(spec.peft) and thing in parse(spec.peft).sources
