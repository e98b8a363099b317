"""How a node of the cluster is told to go: Ray places nothing there any more, Serve moves its replicas, the controller
its packs, and Ray ends the node once nothing is left there."""

from __future__ import annotations

import time
from typing import Any

from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store

_LOOK_S = 0.5
_MESSAGE = "polygraft drain"


class NotDrained(Exception):
    """The node may not go."""


class NoSuchNode(NotDrained):
    """The node is not there."""


def tell(address: str, node: str | None, seconds: float) -> str:
    """Tell the Ray at `address` that the node, which is this machine's where None, goes away in so many seconds; its
    id. Raises NotDrained and NoSuchNode."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # Ray reads its environment when it is imported
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

    gcs = GcsClient(address=address)
    node = _found(gcs, node)
    deadline_ms = round((time.time() + seconds) * 1000)
    taken, why = gcs.drain_node(node, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), _MESSAGE, deadline_ms)
    if not taken:
        raise NotDrained(f"Ray does not let node {node} go: {why}")
    return node


def empty(store: Store, node: str, seconds: float) -> bool:
    """Whether no pack and no replica holds a device of the node any more, within so many seconds."""
    until = time.monotonic() + seconds
    while any(one.value.holders for one in store.scan(keys.devices_of(node))):
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK_S)
    return True


def _found(gcs: Any, node: str | None) -> str:
    from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]
    from ray.util import get_node_ip_address

    infos: dict[str, Any] = {one.node_id.hex(): one for one in gcs.get_all_node_info().values()}
    alive = {id_: one for id_, one in infos.items() if one.state == GcsNodeInfo.ALIVE}
    if node is None:
        address = get_node_ip_address()  # type: ignore[no-untyped-call]
        here = [id_ for id_, one in alive.items() if one.node_manager_address == address or len(alive) == 1]
        if len(here) != 1:
            raise NotDrained(f"{len(here)} nodes are at this machine's address; name one of {', '.join(sorted(alive))}")
        (node,) = here
    if node not in alive:
        raise NoSuchNode(f"there is no node {node}; choices: {', '.join(sorted(alive))}")
    if alive[node].is_head_node:
        raise NotDrained(f"node {node} is the head, which all others need; stop the service in its place")
    return node
