"""Every object of every example is one that Kubernetes, and KubeRay, take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from chart_examples import CI, EVERYTHING, Values
from chart_render import Manifest, objects, of_kind, pod_specs, ray_service
from helm_python import Chart
from jsonschema import Draft7Validator  # type: ignore[import-untyped]

REPOSITORY = Path(__file__).resolve().parents[2]
CRD = REPOSITORY.parent / "shared" / "data" / "crds" / "ray.io_rayservices.yaml"


OLDEST, NEWEST = "1.25.0", kubernetes_validate.latest_version()
"""The oldest Kubernetes that Chart.yaml admits, and the newest whose objects are known here."""
ELSEWHERE = {"RayService", "PodMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute"}
"""Kinds that Kubernetes itself does not have."""


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("values", [None, EVERYTHING, *CI.values()], ids=["defaults", "everything", *CI])
def test_kubernetes_takes_every_object(chart: Chart, values: Values | None, version: str) -> None:
    for manifest in objects(chart, values):
        if manifest["kind"] not in ELSEWHERE:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_check_of_objects_sees_a_misspelt_field(chart: Chart) -> None:
    (policy,) = of_kind(objects(chart), "NetworkPolicy")
    policy["spec"]["ingres"] = policy["spec"].pop("ingress")
    with pytest.raises(kubernetes_validate.ValidationError, match="ingres"):
        kubernetes_validate.validate(policy, NEWEST, strict=True)


@pytest.mark.parametrize("values", [None, *CI.values()], ids=["defaults", *CI])
def test_pods_are_of_what_kubernetes_takes(chart: Chart, values: Values | None) -> None:
    """The pods inside of the RayService too, without KubeRay's definition."""
    for spec in pod_specs(ray_service(chart, values)):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        kubernetes_validate.validate(pod, NEWEST, strict=True)


@pytest.mark.parametrize("values", [None, *CI.values()], ids=["defaults", *CI])
def test_every_object_has_a_name_of_its_own(chart: Chart, values: Values | None) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in objects(chart, values)]
    assert len(names) == len(set(names))
    assert all(len(name) <= 63 for _, name in names)


@pytest.mark.parametrize("values", [None, *CI.values()], ids=["defaults", *CI])
def test_every_pod_is_restricted(chart: Chart, values: Values | None) -> None:
    """As the Pod Security Standard `restricted` asks, with a root that is read only, and without the API's token."""
    manifests = objects(chart, values)
    of_jobs = [one["spec"]["template"]["spec"] for one in manifests if one["kind"] in {"Job", "Deployment"}]
    pods = [*pod_specs(ray_service(chart, values)), *of_jobs, *(one["spec"] for one in of_kind(manifests, "Pod"))]
    scaled = ray_service(chart, values)["spec"]["rayClusterConfig"].get("enableInTreeAutoscaling", False)
    for number, pod in enumerate(pods):
        assert pod["automountServiceAccountToken"] is (number == 0 and scaled), "the head's, where pods come and go"
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert all("hostPath" not in volume for volume in pod.get("volumes", []))
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}


# --- KubeRay's custom resource definition -----------------------------------------------------------------------


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD's structural schema as JSON schema, with the fields the API server would drop made errors."""
    result = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    result.pop("nullable", None)
    result.pop("default", None)
    if "properties" in schema:
        result["properties"] = {name: strict(child) for name, child in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = strict(schema["additionalProperties"])
    if isinstance(schema.get("items"), dict):
        result["items"] = strict(schema["items"])
    if schema.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    if schema.get("nullable"):
        result = {"anyOf": [{"type": "null"}, result]}
    return result


@pytest.fixture(scope="module")
def kuberay() -> Draft7Validator:
    if not CRD.is_file():
        pytest.skip(f"KubeRay's CRD is not at {CRD.relative_to(REPOSITORY.parent)} beside the repository")
    # The pure-Python loader takes several seconds for this file.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    definition = yaml.load(CRD.read_text(encoding="utf-8"), Loader=loader)
    (version,) = (version for version in definition["spec"]["versions"] if version["name"] == "v1")
    return Draft7Validator(strict(version["schema"]["openAPIV3Schema"]))


def complaints(validator: Draft7Validator, manifest: Manifest) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


@pytest.mark.parametrize("values", [None, EVERYTHING, *CI.values()], ids=["defaults", "everything", *CI])
def test_ray_service_fits_kuberays_definition(chart: Chart, kuberay: Draft7Validator, values: Values | None) -> None:
    assert complaints(kuberay, ray_service(chart, values)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.serveConfig", ""),
        ("spec.rayClusterConfig.rayversion", "2.60.0"),
        ("spec.rayClusterConfig.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterConfig.headGroupSpec.template.spec.nodeselector", {}),
        ("spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.ports.0.containerport", 1),
        ("spec.rayClusterConfig.workerGroupSpecs.0.replicas", "1"),
        ("spec.rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.resources.limits.cpu", 0.5),
        ("spec.rayClusterConfig.workerGroupSpecs.0.template.spec.volumes.0.emptyDir.sizeLimit", "16 GB"),
    ],
)
def test_definition_check_sees_wrong_fields_and_types(
    chart: Chart, kuberay: Draft7Validator, path: str, value: Any
) -> None:
    manifest = ray_service(chart)
    *parents, last = path.split(".")
    target: Any = manifest
    for key in parents:
        target = target[int(key)] if isinstance(target, list) else target[key]
    target[last] = value
    found = complaints(kuberay, manifest)
    assert found
    assert all(last in complaint for complaint in found)
