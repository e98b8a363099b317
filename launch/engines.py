"""How the controller has a backbone's replicas deployed: as a Serve application of its own."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.serve import Application, RunTarget, run_many

from polygraft.cluster.actors.applications import application_name
from polygraft.cluster.model import Backbone
from polygraft.cluster.settings import Settings


@dataclass(frozen=True, slots=True)
class DeployBackbone:
    """Called in the controller's process, to which it travels. An application holds classes that import torch, so that
    it is built in a process of its own, which takes torch away when it ends."""

    settings: str  # JSON, since a settings model read again would take in that process's environment

    @staticmethod
    def of(settings: Settings) -> DeployBackbone:
        return DeployBackbone(settings.told)

    def __call__(self, backbone: Backbone) -> None:
        deployer = cast("ActorHandle[_Deployer]", ray.remote(_Deployer).options(num_cpus=0).remote())
        try:
            ray.get(deployer.deploy.remote(self.settings, backbone))
        finally:
            ray.kill(deployer)


class _Deployer:
    def deploy(self, settings: str, backbone: Backbone) -> None:
        from polygraft.serving.app import engine_app

        application = engine_app(Settings.model_validate_json(settings), backbone)
        # Serve starts replicas anew where the version differs, which it draws by lot unless it is told.
        told = (settings, backbone.folder, backbone.dtype, backbone.quantise, backbone.fingerprint, backbone.sizes)
        version = sha256(repr(told).encode()).hexdigest()[:16]
        versioned = Application(application._bound_deployment.options(version=version, _internal=True))
        target = RunTarget(versioned, name=application_name(backbone.name), route_prefix=None)
        run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
