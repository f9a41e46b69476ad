"""As much of a Kubernetes API as Helm asks when it renders with a cluster: what kinds there are, and objects."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml
from chart_examples import CHART
from helm_python import Chart, Config

KINDS = {
    "v1": {"secrets": "Secret", "serviceaccounts": "ServiceAccount", "pods": "Pod", "configmaps": "ConfigMap",
           "persistentvolumeclaims": "PersistentVolumeClaim"},
    "apps/v1": {"deployments": "Deployment"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "rbac.authorization.k8s.io/v1": {"roles": "Role", "rolebindings": "RoleBinding"},
    "monitoring.coreos.com/v1": {"podmonitors": "PodMonitor"},
    "keda.sh/v1alpha1": {"scaledobjects": "ScaledObject"},
    "ray.io/v1": {"rayservices": "RayService"},
}


def discovery(path: str) -> dict[str, Any] | None:
    """The answer to a question about what there is."""
    if path == "/version":
        return {"major": "1", "minor": "33", "gitVersion": "v1.33.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = [
            {"name": name.partition("/")[0], "versions": [one], "preferredVersion": one}
            for name in KINDS if "/" in name
            for one in [{"groupVersion": name, "version": name.partition("/")[2]}]
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    if path == "/openapi/v3":
        return {"paths": {_place(one): {"serverRelativeURL": f"/openapi/v3/{_place(one)}"} for one in KINDS}}
    version = path.removeprefix("/openapi/v3").removeprefix("/apis/").removeprefix("/api/")
    if version not in KINDS:
        return None
    if path.startswith("/openapi/v3/"):
        return {"openapi": "3.0.0", "info": {"title": "", "version": ""}, "paths": {
            f"/{_place(version)}/{name}/{{name}}": {"patch": _checked_by_the_server(version, kind)}
            for name, kind in KINDS[version].items()
        }}
    resources = [
        {"name": name, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": ["get", "create"]}
        for name, kind in KINDS[version].items()
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def _place(version: str) -> str:
    return f"apis/{version}" if "/" in version else f"api/{version}"


def _checked_by_the_server(version: str, kind: str) -> dict[str, Any]:
    """An operation by which Helm sees that it needs no definition of a kind."""
    group, _, number = version.rpartition("/")
    return {
        "parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}],
        "x-kubernetes-group-version-kind": {"group": group, "version": number, "kind": kind},
        "responses": {"200": {"description": "OK"}},
    }


@contextmanager
def kubernetes(objects: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The server's address. objects: by path, such as /api/v1/namespaces/llm/secrets/keys."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            body = discovery(path) or objects.get(path)
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            self.wfile.write(json.dumps(body or missing).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def owned(version: str, kind: str, name: str, **content: Any) -> dict[str, Any]:
    """An object in the namespace llm that an earlier installation of the release demo has made."""
    metadata = {
        "name": name, "namespace": "llm", "labels": {"app.kubernetes.io/managed-by": "Helm"},
        "annotations": {"meta.helm.sh/release-name": "demo", "meta.helm.sh/release-namespace": "llm"},
    }
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **content}


def installed(there: dict[str, dict[str, Any]], values: dict[str, Any]) -> list[dict[str, Any]]:
    """What the chart renders for the release demo in a cluster where these objects are (as `helm --dry-run=server`)."""
    with kubernetes(there) as url:
        access = {
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{"name": "it", "cluster": {"server": url}}], "users": [{"name": "it", "user": {}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        }
        with Chart.load(CHART) as chart, Config(
            kubeconfig_content=json.dumps(access), namespace="llm", storage_driver="memory"
        ) as helm:
            manifest = helm.install(chart, "demo", values, namespace="llm", dry_run="server")["manifest"]
    return [document for document in yaml.safe_load_all(manifest) if document]
