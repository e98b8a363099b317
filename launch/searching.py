"""A search over the service on this machine: the backbone's shape for the space, uploaded files, and Tune on the
service's Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from polygraft.cluster.model import TenantId
from polygraft.cluster.service import Service
from polygraft.cluster.store.connect import connect
from polygraft.grafts.sites import ModelShape
from polygraft.launch.local_ray import environment
from polygraft.launch.output import Failure
from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.study import Trial

if TYPE_CHECKING:  # imports Ray
    from polygraft.tuning.driver import StudyResult


def shape_of(backbone_folder: str) -> ModelShape:
    """The numbers of a backbone that a space depends on."""
    return ModelShape.from_config(json.loads((Path(backbone_folder) / "config.json").read_text()))


def run(  # noqa: PLR0913
    service: Service,
    plan: SearchPlan,
    *,
    key: str,
    tenant: TenantId,
    folder: Path,
    on_trial: Callable[[Trial], None],
    on_progress: Callable[[Trial, float], None],
) -> StudyResult:
    """The study, once its trials have ended; Tune's files go to `folder`.

    Raises Failure when it is interrupted, and whatever else `tuning.driver.search` raises.
    """
    os.environ.update(environment(Path(service.ray_token)))  # before Ray is imported
    from polygraft.tuning.driver import Interrupted, RayCluster, search
    from polygraft.tuning.trial import Access

    store = connect(service.store_url)
    try:
        return search(
            plan,
            store=store,
            access=Access(service.url, key),
            tenant=tenant,
            folder=folder,
            cluster=RayCluster(address=service.ray_address, token=Path(service.ray_token)),
            on_trial=on_trial,
            on_progress=on_progress,
        )
    except Interrupted as error:
        raise Failure(str(error)) from None
    finally:
        store.close()
