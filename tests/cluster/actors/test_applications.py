"""Which Serve applications there are follows from the backbones that are wanted; Serve is played by the test."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeStatus

from polygraft.cluster.actors import applications as module
from polygraft.cluster.actors.applications import Applications, application_name
from polygraft.cluster.model import Backbone
from tests.cluster.builders import make_backbone

A, B = make_backbone("a"), make_backbone("b")


@dataclass
class Serve:
    """`up` says whether it runs; an application that is deleted is DELETING until the test takes it away."""

    up: bool = True
    states: dict[str, ApplicationStatus] = field(default_factory=lambda: {"polygraft": ApplicationStatus.RUNNING})
    deployed: list[Backbone] = field(default_factory=list)
    broken: bool = False

    def status(self) -> ServeStatus:
        if not self.up:
            return ServeStatus()
        apps = {
            name: ApplicationStatusOverview(status=state, message="", last_deployed_time_s=0.0, deployments={})
            for name, state in self.states.items()
        }
        return ServeStatus(applications=apps)

    def delete(self, name: str, _blocking: bool) -> None:
        self.states[name] = ApplicationStatus.DELETING

    def deploy(self, backbone: Backbone) -> None:
        if self.broken:
            raise RuntimeError("no node has room for the deployer")
        self.deployed.append(backbone)
        self.states[application_name(backbone.name)] = ApplicationStatus.DEPLOYING


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    found = Serve()
    monkeypatch.setattr(module, "serve", found)
    return found


def wanted(*backbones: Backbone) -> dict[str, Backbone]:
    return {application_name(backbone.name): backbone for backbone in backbones}


def test_what_is_wanted_is_deployed_once_and_what_is_not_is_deleted(serve: Serve) -> None:
    applications = Applications(serve.deploy)
    calm = [applications._reconcile(wanted(A, B)) for _ in range(2)]
    assert serve.deployed == [A, B] and calm == [False, True]
    assert not applications._reconcile(wanted(replace(A, asked_at=9.0, loaded=True)))
    assert serve.deployed == [A, B]
    assert serve.states["backbone-b"] is ApplicationStatus.DELETING
    assert serve.states["polygraft"] is ApplicationStatus.RUNNING, "it is somebody else's"


def test_one_that_is_being_deleted_is_deployed_again_when_it_is_wanted_again(serve: Serve) -> None:
    applications = Applications(serve.deploy)
    for backbones in ((A,), (), (A,)):
        applications._reconcile(wanted(*backbones))
    assert serve.deployed == [A, A] and serve.states["backbone-a"] is ApplicationStatus.DEPLOYING


def test_one_whose_record_changed_is_deployed_anew(serve: Serve) -> None:
    applications = Applications(serve.deploy)
    other = replace(A, folder="/elsewhere", fingerprint="another")
    for one in (A, other, other):
        applications._reconcile(wanted(one))
    assert serve.deployed == [A, other]


def test_another_controller_deploys_what_is_there_once_more_which_changes_nothing(serve: Serve) -> None:
    for _ in range(2):
        Applications(serve.deploy)._reconcile(wanted(A))
    assert serve.deployed == [A, A]


def test_what_failed_is_tried_again_and_nothing_is_done_before_serve_is_up(serve: Serve) -> None:
    applications = Applications(serve.deploy)
    serve.up = False
    assert not applications._reconcile(wanted(A))
    serve.up, serve.broken = True, True
    with pytest.raises(RuntimeError):
        applications._reconcile(wanted(A))
    serve.broken = False
    applications._reconcile(wanted(A))
    assert serve.deployed == [A]


@pytest.mark.parametrize(
    ("name", "application"),
    [
        ("smollm2", "backbone-smollm2"),
        ("Qwen/Qwen3-0.6B", "backbone-Qwen3-0.6B-fb68f5a6"),
        ("/models/tiny", "backbone-tiny-58f42be7"),
        ("/other/tiny/", "backbone-tiny-e375f648"),
    ],
)
def test_an_application_s_name_is_the_backbone_s_or_a_digest_of_it(name: str, application: str) -> None:
    assert application_name(name) == application
