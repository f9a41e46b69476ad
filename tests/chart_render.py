"""The chart rendered by the real Helm library, and the parts of what it renders."""

from __future__ import annotations

from typing import Any

import yaml
from chart_examples import Values
from helm_python import Chart

Manifest = dict[str, Any]


def objects(chart: Chart, values: Values | None = None, name: str = "demo") -> list[Manifest]:
    """Every Kubernetes object of a release (NOTES.txt is text for the user, not an object)."""
    rendered = chart.render(values, name=name, namespace="llm")
    texts = [text for path, text in sorted(rendered.items()) if path.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def ray_service(chart: Chart, values: Values | None = None, name: str = "demo") -> Manifest:
    (service,) = of_kind(objects(chart, values, name), "RayService")
    return service


def serve_config(service: Manifest) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return config


def app_args(service: Manifest) -> dict[str, Any]:
    args: dict[str, Any] = serve_config(service)["applications"][0]["args"]
    return args


def worker_group(service: Manifest) -> dict[str, Any]:
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return group  # type: ignore[no-any-return]


def pod_specs(service: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod specs of head and worker."""
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
    return head["template"]["spec"], worker_group(service)["template"]["spec"]


def containers(service: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
    head, worker = (spec["containers"] for spec in pod_specs(service))
    assert len(worker) == 1
    return head[0], worker[0]


def environment(container: dict[str, Any]) -> dict[str, Any]:
    """Variable name to its plain value or to where it comes from."""
    entries = container.get("env", [])
    names = [entry["name"] for entry in entries]
    assert len(names) == len(set(names))
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in entries}


def nested(path: str, value: Any) -> Values:
    """{"a": {"b": value}} for "a.b"."""
    for key in reversed(path.split(".")):
        value = {key: value}
    result: Values = value
    return result


def reference(secret: str, key: str) -> dict[str, Any]:
    """Where a variable comes from that is an entry of a Secret."""
    return {"secretKeyRef": {"name": secret, "key": key}}


def application(service: Manifest) -> dict[str, Any]:
    """The one application of serveConfigV2."""
    (one,) = serve_config(service)["applications"]
    return one  # type: ignore[no-any-return]
