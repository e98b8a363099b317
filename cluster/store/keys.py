"""Every key, prefix, stream name and lease scope of the store, in one place."""

from __future__ import annotations

from collections.abc import Mapping

from polygraft.cluster.model import (
    Alias,
    ApiKey,
    Backbone,
    DataFile,
    DeviceId,
    FileId,
    Graft,
    Job,
    JobId,
    Occupancy,
    Pace,
    Pack,
    PackId,
    Record,
    Replica,
    ReplicaId,
    Search,
    Snapshot,
    Study,
    StudyId,
    TenantId,
)
from polygraft.cluster.store.base import Key, Listing, Prefix, StreamKey

JOBS: Prefix[Job] = Prefix("job/")
BACKBONES: Prefix[Backbone] = Prefix("backbone/")
PACKS: Prefix[Pack] = Prefix("pack/")
PACES: Prefix[Pace] = Prefix("pace/")
REPLICAS: Prefix[Replica] = Prefix("replica/")
DEVICES: Prefix[Occupancy] = Prefix("device/")
FILES: Prefix[DataFile] = Prefix("file/")
GRAFTS: Prefix[Graft] = Prefix("graft/")
ALIASES: Prefix[Alias] = Prefix("alias/")
RUNNING_SEARCHES: Listing[Search] = Listing("running-searches")  # of all tenants
STUDIES: Prefix[Study] = Prefix("study/")
API_KEYS: Prefix[ApiKey] = Prefix("apikey/")
SNAPSHOT: Key[Snapshot] = Key("snapshot/fleet")

CONTROLLER = "controller"  # lease scope of the one who decides

TYPES: Mapping[str, type[Record]] = {
    "alias": Alias,
    "apikey": ApiKey,
    "backbone": Backbone,
    "device": Occupancy,
    "file": DataFile,
    "graft": Graft,
    "job": Job,
    "pace": Pace,
    "pack": Pack,
    "replica": Replica,
    "snapshot": Snapshot,
    "search": Search,
    "study": Study,
}


def job(job: JobId) -> Key[Job]:
    return Key(f"{JOBS}{job}")


def backbone(name: str) -> Key[Backbone]:
    return Key(f"{BACKBONES}{name}")


def jobs_of(tenant: TenantId) -> Listing[Job]:
    return Listing(f"jobs/{tenant}")


def unfinished_jobs_of(tenant: TenantId) -> Listing[Job]:
    return Listing(f"unfinished-jobs/{tenant}")


def searches_of(tenant: TenantId) -> Listing[Search]:
    return Listing(f"searches/{tenant}")


def running_searches_of(tenant: TenantId) -> Listing[Search]:
    return Listing(f"running-searches/{tenant}")


def files_of(tenant: TenantId) -> Listing[DataFile]:
    return Listing(f"files/{tenant}")


def pack(pack: PackId) -> Key[Pack]:
    return Key(f"{PACKS}{pack}")


def pace(pack: PackId) -> Key[Pace]:
    return Key(f"{PACES}{pack}")


def replica(replica: ReplicaId) -> Key[Replica]:
    return Key(f"{REPLICAS}{replica}")


def device(device: DeviceId) -> Key[Occupancy]:
    return Key(f"{DEVICES}{device}")


def devices_of(node: str) -> Prefix[Occupancy]:
    return Prefix(f"{DEVICES}{node}/")


def file(file: FileId) -> Key[DataFile]:
    return Key(f"{FILES}{file}")


def search(search: StudyId) -> Key[Search]:
    return Key(f"search/{search}")


def study(study: StudyId) -> Key[Study]:
    return Key(f"{STUDIES}{study}")


def api_key(digest: str) -> Key[ApiKey]:
    return Key(f"{API_KEYS}{digest}")


def graft(tenant: TenantId, name: str, version: int) -> Key[Graft]:
    return Key(f"{grafts(tenant)}{name}@{version}")


def grafts(tenant: TenantId) -> Prefix[Graft]:
    return Prefix(f"{GRAFTS}{tenant}/")


def alias(tenant: TenantId, name: str) -> Key[Alias]:
    return Key(f"{aliases(tenant)}{name}")


def aliases(tenant: TenantId) -> Prefix[Alias]:
    return Prefix(f"{ALIASES}{tenant}/")


def record_type(key: str) -> type[Record]:
    """The type of the record at `key`; raises ValueError for a key that this module did not build."""
    kind = key.partition("/")[0]
    if kind not in TYPES:
        raise ValueError(f"key {key!r} names no kind of record; choices: {', '.join(TYPES)}")
    return TYPES[kind]


def pack_scope(pack: PackId) -> str:
    """Lease scope of the pack's worker."""
    return f"pack/{pack}"


def replica_scope(replica: ReplicaId) -> str:
    """Lease scope of the replica's process."""
    return f"replica/{replica}"


def commands(pack: PackId) -> StreamKey:
    """Entries {"op": "admit" | "cancel" | "leave" | "close" | "stop", "job": id}, which the pack's worker reads at step
    boundaries. Told to close it goes on until it has no job; told to stop it puts them down as they are."""
    return StreamKey(f"pack/{pack}/commands")


def search_log(search: StudyId) -> StreamKey:
    """Entries {"message", "at", "trial"}, one whenever a trial is asked for or told and when the search ends."""
    return StreamKey(f"search/{search}/log")


def metrics(job: JobId) -> StreamKey:
    """Entries {"step", "loss", "lr", "grad_norm", "tokens", "at", ...}, one a training step."""
    return StreamKey(f"job/{job}/metrics")


def log(job: JobId) -> StreamKey:
    """Entries {"level", "message", "at", "data"}, shown as the events of OpenAI's API."""
    return StreamKey(f"job/{job}/log")


def demand(backbone: str) -> StreamKey:
    """Entries {"ingress", "streams", "waiting"}, what an ingress wants of the backbone's replicas, again every second
    while it wants something."""
    return StreamKey(f"backbone/{backbone}/demand")


def replica_changes(backbone: str) -> StreamKey:
    """Entries {"replica"}, one for each that was opened or closed."""
    return StreamKey(f"backbone/{backbone}/replicas")
