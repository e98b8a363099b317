"""Serve's REST API puts the same and another config while streams run: replicas stay, and no stream is cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from ray import serve

from polygraft.cluster.actors.applications import ENGINE
from polygraft.cluster.policy.devices import SHARE
from polygraft.cluster.settings import ServeSettings
from polygraft.cluster.store import keys
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.serving.fleet import StoreFleet
from polygraft.serving.gateway import Gateway
from polygraft.serving.remote import ActorLink
from polygraft.serving.replica import SCALER
from tests.ray.local import free_port, local_ray, write_devices
from tests.ray.test_replicas import wanted
from tests.serving.replicas import said
from tests.tiny import tiny_llama

ROOT = Path(__file__).parents[2]
APPLICATION = "backbone-tiny"
SERVE = ServeSettings(max_streams=4, max_context=1000, kv_bytes=8 << 20, max_rows=64, max_replicas=3)


def config(args: dict[str, str], most: int) -> dict[str, object]:
    # The policy's arguments are part of the code's version for Serve, which restarts replicas where that changes.
    rules = {"holds": SERVE.max_streams, "least": 1, "most": None, "calm_s": SERVE.calm_s, "idle_s": None}
    kwargs = {"store_url": args["store_url"], "backbone": args["backbone"], "share": SHARE, "scaling": rules}
    scaling = {
        "min_replicas": 1,
        "max_replicas": most,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "policy": {"policy_function": SCALER, "policy_kwargs": kwargs},
    }
    application = {
        "name": APPLICATION,
        "route_prefix": None,
        "import_path": "tests.ray.declared:build",
        "args": args,
        "deployments": [{"name": ENGINE, "autoscaling_config": scaling}],
    }
    return {"proxy_location": "Disabled", "applications": [application]}


@pytest.mark.nightly
@pytest.mark.timeout(280)
def test_a_config_that_is_put_again_or_changed_leaves_the_replicas_and_their_streams(tmp_path: Path) -> None:
    port = free_port()
    path = f"{ROOT}:{ROOT / '.types'}"  # the build runs in a worker, which must find the tests
    with EmbeddedServer(tmp_path / "store") as server, local_ray({"PYTHONPATH": path}, devices=4, dashboard_port=port):
        store = connect(server.url)
        write_devices(store, 4)
        args = {
            "home": str(tmp_path / "data"),
            "store_url": server.url,
            "backbone": "tiny",
            "folder": str(tiny_llama(tmp_path / "tiny")),
            "serve": SERVE.model_dump_json(),
            "step_floor_s": "0.05",
        }
        url = f"http://127.0.0.1:{port}/api/serve/applications/"

        def put(most: int) -> None:
            answer = httpx.put(url, json=config(args, most), timeout=60)
            assert answer.status_code == 200, answer.text

        def running() -> dict[str, int]:
            applications = serve.status().applications
            if APPLICATION not in applications or ENGINE not in applications[APPLICATION].deployments:
                return {}
            states = applications[APPLICATION].deployments[ENGINE].replica_states
            return {str(state): count for state, count in states.items() if count}

        def open_() -> set[str]:
            return {one.value.id for one in store.scan(keys.REPLICAS)}

        async def until(holds: Callable[[], bool]) -> None:
            async with asyncio.timeout(120):
                while not holds():
                    await asyncio.sleep(0.1)

        async def streams() -> None:
            fleet = StoreFleet(store, "tiny", connect=ActorLink)
            gateway = Gateway({}, ingress="i", settings=SERVE, ready_s=120, fleet=fleet)
            await gateway.start()
            work = [asyncio.create_task(said(gateway, wanted(f"s{n}", 700))) for n in range(10)]
            await until(lambda: running() == {"RUNNING": 3} and len(open_()) == 3)
            there = open_()
            for most in (3, 4):
                await asyncio.to_thread(put, most)
                for _ in range(40):  # 4 s, in which Serve has acted many times; while it builds it lists no deployment
                    assert running() in ({}, {"RUNNING": 3}) and open_() == there
                    await asyncio.sleep(0.1)
                await until(lambda: running() == {"RUNNING": 3})
                assert open_() == there
                details = await asyncio.to_thread(lambda: httpx.get(url, timeout=60).json())
                found = details["applications"][APPLICATION]["deployments"][ENGINE]
                assert found["target_num_replicas"] == 3, json.dumps(found)
            assert not any(task.done() for task in work)
            assert all(len(tokens) == 700 for tokens in await asyncio.gather(*work))
            assert open_() <= there  # some may have gone when there was less to do
            await gateway.close()

        try:
            put(3)
            asyncio.run(streams())
        finally:
            serve.shutdown()
            store.close()
