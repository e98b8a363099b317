"""The manifests of k8s/base against the schemas they must meet, without a cluster.

Built-in objects meet Kubernetes' own strict schemas. The RayService meets KubeRay's CRD, read from `../shared/crds`;
where that folder is absent, that half is skipped with a warning. A typo anywhere must be refused.
"""

from __future__ import annotations

import ast
import copy
import gzip
import json
import re
import shlex
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import jsonschema
import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel
from ray._common.utils import import_attr
from ray.serve.schema import ServeDeploySchema

from polygraft.launch import local_ray

JSON: TypeAlias = Any  # what a manifest holds, as a schema says and no type

ROOT = Path(__file__).parents[2]
BASE = ROOT / "k8s" / "base"
CRDS = ROOT.parent / "shared" / "crds"
KUSTOMIZATION = yaml.safe_load((BASE / "kustomization.yaml").read_text())
OBJECTS = [
    manifest for name in KUSTOMIZATION["resources"] for manifest in yaml.safe_load_all((BASE / name).read_text())
]
BUILT_IN = [manifest for manifest in OBJECTS if manifest["kind"] != "RayService"]
RAY_SERVICE = next(manifest for manifest in OBJECTS if manifest["kind"] == "RayService")
CLUSTER = RAY_SERVICE["spec"]["rayClusterConfig"]
RAY_GROUPS = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
OLDEST, NEWEST = "1.30", "1.37"  # Kubernetes versions the schemas are taken from


def named(kind: str, name: str) -> JSON:
    return next(o for o in OBJECTS if (o["kind"], o["metadata"]["name"]) == (kind, name))


def edited(manifest: JSON, path: str, value: JSON) -> JSON:
    """A copy with `value` at the dotted path, whose last part may be new."""
    changed = copy.deepcopy(manifest)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node = changed
    for part in parents:
        node = node[part]
    node[last] = value
    return changed


def test_the_kustomization_lists_every_manifest_and_nothing_else() -> None:
    assert set(KUSTOMIZATION) == {"apiVersion", "kind", "namespace", "resources"}
    assert sorted(KUSTOMIZATION["resources"]) == sorted(
        path.name for path in BASE.iterdir() if path.name != "kustomization.yaml"
    )
    assert named("Namespace", KUSTOMIZATION["namespace"])


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("manifest", BUILT_IN, ids=lambda o: f"{o['kind']}-{o['metadata']['name']}")
def test_a_built_in_object_meets_kubernetes_strict_schema(manifest: JSON, version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("StatefulSet", "polygraft-valkey", "spec.replica", 1),
        ("StatefulSet", "polygraft-valkey", "spec.replicas", "one"),
        ("StatefulSet", "polygraft-valkey", "spec.template.spec.containers.0.readinesProbe", {}),
        ("Service", "polygraft-valkey", "spec.ports.0.targetport", "valkey"),
        ("NetworkPolicy", "polygraft-valkey", "spec.ingress.0.form", []),
        ("PersistentVolumeClaim", "polygraft-data", "spec.accessModes", "ReadWriteMany"),
    ],
)
def test_a_typo_in_a_built_in_object_is_refused(kind: str, name: str, path: str, value: JSON) -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(edited(named(kind, name), path, value), NEWEST, strict=True)


@pytest.fixture(scope="module")
def ray_service_schema() -> JSON:
    path = CRDS / "ray.io_rayservices.yaml.gz"
    if not path.exists():
        message = f"the RayService was NOT checked against KubeRay's CRD: {path.name} is not in ../shared/crds"
        warnings.warn(message, stacklevel=1)
        pytest.skip(message)
    with gzip.open(path, "rt") as file:
        definition = yaml.load(file, Loader=yaml.CSafeLoader)
    version = next(v for v in definition["spec"]["versions"] if f"ray.io/{v['name']}" == RAY_SERVICE["apiVersion"])
    assert version["served"] and version["storage"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def test_the_ray_service_meets_kuberays_crd(ray_service_schema: JSON) -> None:
    manifest = with_defaults(ray_service_schema, RAY_SERVICE)
    errors = jsonschema.Draft202012Validator(ray_service_schema).iter_errors(manifest)
    assert not [f"{error.json_path}: {error.message}" for error in errors]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.serveConfigv2", ""),
        ("spec.rayClusterConfig.headGroupSpec.rayStartParam", {}),
        ("spec.rayClusterConfig.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterConfig.workerGroupSpecs.0.maxReplicas", "four"),
        ("spec.rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.imagePullpolicy", "Always"),
        ("spec.rayClusterConfig.gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef.keys", "password"),
        ("spec.rayClusterConfig.authOptions.mode", "tokens"),
    ],
)
def test_a_typo_in_the_ray_service_is_refused(ray_service_schema: JSON, path: str, value: JSON) -> None:
    manifest = with_defaults(ray_service_schema, edited(RAY_SERVICE, path, value))
    assert not jsonschema.Draft202012Validator(ray_service_schema).is_valid(manifest)


def test_the_serve_configuration_meets_rays_schema_with_no_unknown_key() -> None:
    config = yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"])
    parsed = ServeDeploySchema.model_validate(config)
    assert [(app.name, app.route_prefix) for app in parsed.applications] == [("polygraft", "/")]
    assert list(unknown_keys(ServeDeploySchema, config)) == []


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        ("route_prefix", "/", "route_prefix"),
        ("http_options.hosts", "0.0.0.0", "http_options.hosts"),
        ("applications.0.import_paths", "a:b", "applications.0.import_paths"),
        (
            "applications.0.deployments",
            [{"name": "engine", "max_ongoing_request": 1}],
            "applications.0.deployments.0.max_ongoing_request",
        ),
    ],
)
def test_a_typo_in_the_serve_configuration_is_refused(path: str, value: JSON, key: str) -> None:
    config = edited(yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"]), path, value)
    ServeDeploySchema.model_validate(config)  # Ray itself lets these pass
    assert list(unknown_keys(ServeDeploySchema, config)) == [key]


def test_the_serve_application_is_a_function_of_this_package() -> None:
    application = yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"])["applications"][0]
    module, function = application["import_path"].split(":")
    path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert function in functions


def test_the_cluster_runs_the_locked_ray() -> None:
    assert f"\nray=={CLUSTER['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_a_device_worker_offers_one_device_and_the_head_runs_no_task() -> None:
    (worker,) = CLUSTER["workerGroupSpecs"]
    (resources,) = shlex.split(worker["rayStartParams"]["resources"])  # as the shell that runs `ray start` reads it
    assert json.loads(resources) == {"device": 1}
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_head_and_workers_share_image_environment_and_data() -> None:
    head, *workers = (group["template"]["spec"] for group in RAY_GROUPS)
    for worker in workers:
        for field in ("image", "env", "volumeMounts"):
            assert worker["containers"][0][field] == head["containers"][0][field]
        assert worker["volumes"] == head["volumes"]


def test_ray_pods_take_the_first_api_key_from_a_secret_and_nothing_from_services() -> None:
    for group in RAY_GROUPS:
        spec = group["template"]["spec"]
        assert spec["enableServiceLinks"] is False, "a Service named polygraft gives a POLYGRAFT_PORT of its own"
        (volume,) = (volume for volume in spec["volumes"] if "secret" in volume)
        assert volume["secret"]["secretName"] == "polygraft-api-key" and "optional" not in volume["secret"]
        (mount,) = (one for one in spec["containers"][0]["volumeMounts"] if one["name"] == volume["name"])
        variables = {one["name"]: one.get("value") for one in spec["containers"][0]["env"]}
        assert variables["POLYGRAFT_API_KEY_FILE"] == f"{mount['mountPath']}/key"


def test_ray_is_told_what_it_is_told_on_one_machine() -> None:
    """What proxies answer while the application starts, among it, that replicas which do not answer are ended, and when
    a call fails."""
    assert import_attr(local_ray.PROXY["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"])()
    for group in RAY_GROUPS:
        variables = {one["name"]: one.get("value") for one in group["template"]["spec"]["containers"][0]["env"]}
        assert variables.items() >= {**local_ray.PROXY, **local_ray.REPLICAS, **local_ray.CALLS}.items()


def test_every_secret_that_the_manifests_name_is_made_in_the_readme() -> None:
    named = set(re.findall(r"secretName: (\S+)", (BASE / "ray-service.yaml").read_text()))
    named |= {one["valueFrom"]["secretKeyRef"]["name"] for c in containers() for one in c["env"] if "valueFrom" in one}
    made = re.findall(r"create secret generic (\S+)", (ROOT / "k8s" / "README.md").read_text())
    assert set(made) == named


def test_only_ray_pods_reach_the_store() -> None:
    ray_labels = {tuple(sorted(group["template"]["metadata"]["labels"].items())) for group in RAY_GROUPS}
    store = named("StatefulSet", "polygraft-valkey")["spec"]["template"]["metadata"]["labels"]
    policy = named("NetworkPolicy", "polygraft-valkey")["spec"]
    assert policy["podSelector"]["matchLabels"] == store
    (rule,) = policy["ingress"]
    (peer,) = rule["from"]
    assert set(peer) == {"podSelector"}  # no namespaceSelector: this namespace only
    assert ray_labels == {tuple(sorted(peer["podSelector"]["matchLabels"].items()))}


def test_the_store_asks_for_the_password_that_ray_and_polygraft_send() -> None:
    reference = {"name": "polygraft-valkey", "key": "password"}
    assert CLUSTER["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"] == reference
    for container in containers():
        passwords = [variable for variable in container["env"] if variable["name"] == "VALKEY_PASSWORD"]
        assert [variable["valueFrom"]["secretKeyRef"] for variable in passwords] == [reference]
    assert not [manifest for manifest in OBJECTS if manifest["kind"] == "Secret"]  # none is kept in the repository


def test_no_pod_runs_as_root_or_may_gain_privileges() -> None:
    for pod in pods():
        assert pod["serviceAccountName"] == "polygraft"
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers():
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_the_dockerfile_copies_what_exists_and_every_package() -> None:
    lines = (ROOT / "k8s" / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    assert not [name for name in copied if not (ROOT / name).exists()]
    folders = re.search(r"FOLDERS = (\(.*\))", (ROOT / "setup.py").read_text())
    assert folders and set(ast.literal_eval(folders[1])) <= copied


def pods() -> list[JSON]:
    store = named("StatefulSet", "polygraft-valkey")["spec"]["template"]["spec"]
    return [store, *(group["template"]["spec"] for group in RAY_GROUPS)]


def containers() -> list[JSON]:
    return [container for pod in pods() for container in pod["containers"]]


def strict(schema: JSON) -> JSON:
    """A CRD's schema as JSON Schema in which unknown fields are errors, as under strict decoding."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and "type" in schema:
        result["type"] = [schema["type"], "null"]
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and "properties" in schema and not open_ended:
        result["additionalProperties"] = False
    return result


def with_defaults(schema: JSON, value: JSON) -> JSON:
    """`value` with the schema's defaults filled in, which the API server does before it validates."""
    if isinstance(value, list):
        return [with_defaults(schema.get("items", {}), item) for item in value]
    if not isinstance(value, dict):
        return value
    fields = schema.get("properties", {})
    filled = {name: copy.deepcopy(field["default"]) for name, field in fields.items() if "default" in field} | value
    return {name: with_defaults(fields.get(name, {}), item) for name, item in filled.items()}


def unknown_keys(model: type[BaseModel], value: dict[str, JSON], prefix: str = "") -> Iterator[str]:
    """Dotted paths in `value` that `model` has no field for; Ray's own schema drops them silently."""
    for key, item in value.items():
        if key not in model.model_fields:
            yield f"{prefix}{key}"
            continue
        for nested in models_of(model.model_fields[key].annotation):
            if isinstance(item, dict):
                yield from unknown_keys(nested, item, f"{prefix}{key}.")
            for index, element in enumerate(item if isinstance(item, list) else ()):
                yield from unknown_keys(nested, element, f"{prefix}{key}.{index}.")


def models_of(annotation: object) -> list[type[BaseModel]]:
    """The pydantic models an annotation mentions: `list[M] | None` gives [M]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in models_of(argument)]
