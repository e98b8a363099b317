"""The Ray of one machine: how it is set up, so that it is small, private and quick to start."""

from __future__ import annotations

import os
from pathlib import Path

from polygraft.cluster.actors.protocols import DEVICE
from polygraft.launch.machine import Machine

RAY = "ray"
_OBJECT_STORE_BYTES = 150 << 20  # grafts and backbones do not pass through it

# What Serve's proxies need, which a cluster has and one machine has not. A token is a message from the ingress to a
# proxy: by gRPC, on the loops that read and write sockets, it costs a fraction of an item of a Ray generator that
# passes from loop to loop.
PROXY = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "polygraft.serving.http.proxy:middlewares",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(64 << 20),  # what waits of an answer goes in one message
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
# What Serve's controller needs, on a cluster, too: a replica that does not answer has nothing to say to its end either.
REPLICAS = {"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1"}
# What every process of Ray needs, on a cluster, too: a call to one that is stopped, or cut off, fails after a minute.
# By itself Ray bears it for seven, in which its GCS, which makes room for one pack after the other, makes none.
CALLS = {"RAY_grpc_client_keepalive_time_ms": "30000", "RAY_grpc_client_keepalive_timeout_ms": "30000"}
# Read by Ray when it starts, and by every process it starts.
_ENVIRONMENT = {
    **REPLICAS,
    **CALLS,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # one machine, on any system: Ray listens on the loopback interface
    "RAY_worker_maximum_startup_concurrency": "16",  # a pack and a search start a dozen processes that hardly compute
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # else every shutdown waits for 30 s
    # What wakes processes ten times a second takes the cores from a pack: its threads wait for each other.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    "LOG_NAME_UPDATE_INTERVAL_S": "2",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # else it lists the folder of logs each time that it looks
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # what every process takes, for a dashboard that is not there
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",  # none: every process told the dashboard what it did, each second
    # Train watches its one worker often, which is what makes a run start in seconds; what nobody reads is off.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Ray gives an actor without CPUs one thread; those that compute here take all cores, and sleep after a short spin.
    "GOMP_SPINCOUNT": "20000",
    "TOKENIZERS_PARALLELISM": "false",
}


def environment(token: Path) -> dict[str, str]:
    """What a process must have in its environment before it imports Ray, to start this Ray or to join it."""
    cores = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return {**_ENVIRONMENT, **access(token), "OMP_NUM_THREADS": cores}


def access(token: Path) -> dict[str, str]:
    """Ray's ports are open to whoever reaches this machine; only holders of the token are let in."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def start_ray(scratch: Path, namespace: str, machine: Machine, devices: int) -> str:
    """Start Ray in this process, on a machine that is so many devices, and return its address; it ends with this
    process."""
    import ray

    ray.init(
        address="local",
        namespace=namespace,
        num_cpus=machine.cores,
        num_gpus=machine.gpus,
        resources={DEVICE: devices},
        _memory=machine.bytes,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _temp_dir=str(scratch / RAY),  # which Ray opens to everybody; nobody else enters the folder around it
    )
    return str(ray.get_runtime_context().gcs_address)
