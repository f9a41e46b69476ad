"""Who changes the number of replicas and pods: nobody, Ray, or KEDA through the container beside Ray's head."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from chart_examples import CHART, CI, Values, model
from chart_render import (
    app_args,
    application,
    containers,
    environment,
    objects,
    of_kind,
    pod_specs,
    ray_service,
    reference,
    worker_group,
)
from fake_kubernetes import installed, owned
from helm_python import Chart

from cluster.config import AppConfig

KEDA = {"autoscaling": {"mode": "keda"}}


def bounds(chart: Chart, values: Values) -> list[int]:
    group = worker_group(ray_service(chart, values))
    return [group[key] for key in ("minReplicas", "replicas", "maxReplicas")]


@pytest.mark.parametrize(
    ("values", "pods"),
    [
        (CI["autoscale"], [1, 1, 8]),
        ({"models": [model(deployment_config={"autoscaling_config": {"min_replicas": 0, "max_replicas": 3}})],
          "autoscaling": {"mode": "ray"}}, [0, 0, 3]),
        ({"models": [model(2), model(deployment_config={"autoscaling_config": {"max_replicas": 3}}) | {
            "model_loading_config": {"model_id": "n"}}], "autoscaling": {"mode": "ray"}}, [3, 3, 5]),
        (CI["autoscale"] | {"gpu": {"workers": 4}}, [1, 1, 4]),
        (KEDA, [1, 1, 4]),
        (CI["keda"], [0, 0, 6]),
        (CI["full"], [2, 2, 4]),
    ],
    ids=["ray", "to-zero", "one-fixed", "at-most", "keda", "keda-idle", "two-gpus"],
)
def test_pods_follow_the_bounds_of_the_replicas(chart: Chart, values: Values, pods: list[int]) -> None:
    assert bounds(chart, values) == pods
    cluster = ray_service(chart, values)["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"


def test_nothing_scales_by_default(chart: Chart) -> None:
    cluster = ray_service(chart)["spec"]["rayClusterConfig"]
    assert not cluster.keys() & {"enableInTreeAutoscaling", "autoscalerOptions"}
    assert "external_scaler_enabled" not in application(ray_service(chart))


def test_the_autoscaler_s_container_is_as_confined_as_the_others(chart: Chart) -> None:
    options = ray_service(chart, CI["autoscale"])["spec"]["rayClusterConfig"]["autoscalerOptions"]
    head, _ = containers(ray_service(chart, CI["autoscale"]))
    assert options["securityContext"] == head["securityContext"]
    assert options["volumeMounts"][0] in head["volumeMounts"], "of the pod's own volumes"


def test_an_incremental_upgrade_has_what_kuberay_asks_for(chart: Chart) -> None:
    service = ray_service(chart, CI["incremental-upgrade"])["spec"]
    assert service["upgradeStrategy"] == {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": {
            "gatewayClassName": "istio", "stepSizePercent": 10, "intervalSeconds": 60, "maxSurgePercent": 50,
        },
    }
    assert service["rayClusterConfig"]["enableInTreeAutoscaling"] is True


# --- KEDA -------------------------------------------------------------------------------------------------------


def scaled(chart: Chart, values: Values) -> dict[str, Any]:
    """By model's Serve deployment: the ScaledObject's spec."""
    manifests = objects(chart, values)
    (config,) = [one for one in of_kind(manifests, "ConfigMap") if "targets.json" in one["data"]]
    targets = json.loads(config["data"]["targets.json"])
    specs = {one["metadata"]["name"]: one["spec"] for one in of_kind(manifests, "ScaledObject")}
    counted = {one["metadata"]["name"]: one for one in of_kind(manifests, "Deployment")}
    assert specs.keys() == targets.keys() == counted.keys()
    assert all("replicas" not in one["spec"] for one in counted.values()), "an upgrade would undo KEDA's number"
    (role,) = of_kind(manifests, "Role")
    (rule,) = role["rules"]
    assert set(rule.pop("resourceNames")) == targets.keys()
    assert rule == {"apiGroups": ["apps"], "resources": ["deployments/scale"], "verbs": ["get"]}
    for name, spec in specs.items():
        assert spec.pop("scaleTargetRef") == {"name": name}
    return {targets[name]: spec for name, spec in specs.items()}


def test_each_model_is_scaled_by_our_metric(chart: Chart) -> None:
    other = {"model_loading_config": {"model_id": "Org/n-1.5"}}
    found = scaled(chart, KEDA | {"models": [model(), other]})
    assert found.keys() == {"HeadraceServer:m", "HeadraceServer:Org--n-1_5"}
    for spec, name in zip(found.values(), ("m", "Org/n-1.5"), strict=True):
        (trigger,) = spec["triggers"]
        assert trigger["metadata"]["query"] == f'max(ray_headrace_replicas_wanted{{namespace="llm",model="{name}"}})'
        assert (trigger["metadata"]["threshold"], trigger["metadata"]["activationThreshold"]) == ("1", "0")
        assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (1, 4)
        assert not spec.keys() & {"idleReplicaCount", "fallback"}


def test_a_model_that_nobody_asks_for_has_no_replica(chart: Chart) -> None:
    (spec,) = scaled(chart, CI["keda"]).values()
    assert (spec["idleReplicaCount"], spec["minReplicaCount"], spec["maxReplicaCount"]) == (0, 2, 6)
    assert spec["fallback"] == {"failureThreshold": 3, "replicas": 2}
    number, activity = (trigger["metadata"] for trigger in spec["triggers"])
    assert float(number["activationThreshold"]) > 1024, "the wanted number is never 0: it says nothing of activity"
    assert activity["activationThreshold"] == "0" and "http_requests_total" in activity["query"]
    assert float(activity["threshold"]) > 1024, "activity says nothing of the number"
    service = ray_service(chart, CI["keda"])
    options = AppConfig.model_validate(app_args(service)).ingress_deployment_config
    assert options["ray_actor_options"] == {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
    assert "ingress_deployment_config" not in app_args(ray_service(chart, KEDA)), "else a worker can carry the ingress"


def test_ray_serve_takes_numbers_from_outside(chart: Chart) -> None:
    service = ray_service(chart, CI["keda"])
    app = application(service)
    assert app["external_scaler_enabled"] is True
    _, deployment = app["deployments"]
    assert deployment["num_replicas"] == 2 and deployment["autoscaling_config"] is None, "two would change the number"
    head, worker = pod_specs(service)
    assert [one["name"] for one in head["containers"]] == ["ray-head", "scaler"], "KubeRay takes the first for Ray's"
    assert len(worker["containers"]) == 1
    token = environment(head["containers"][1])["RAY_AUTH_TOKEN"]
    assert token == reference("demo-headrace-auth", "auth_token")
    (binding,) = of_kind(objects(chart, CI["keda"]), "RoleBinding")
    assert [one["name"] for one in binding["subjects"]] == [head["serviceAccountName"]]


def test_an_upgrade_keeps_the_number_that_keda_has_set() -> None:
    """Ray Serve takes the configuration's number with each upgrade; KEDA's would come back only later."""
    (name,) = [one["metadata"]["name"] for one in of_kind(installed({}, KEDA), "ScaledObject")]
    for there, replicas in ({}, 1), ({"replicas": 3}, 3), ({"replicas": 0}, 1):
        path = f"/apis/apps/v1/namespaces/llm/deployments/{name}"
        objects = {path: owned("apps/v1", "Deployment", name, spec=there)} if there else {}
        (service,) = of_kind(installed(objects, KEDA), "RayService")
        _, deployment = application(service)["deployments"]
        assert deployment["num_replicas"] == replicas


# --- the container that hands KEDA's number to Ray Serve --------------------------------------------------------


class Clusters:
    """Kubernetes' API and Ray's dashboard in one server.

    wanted: replicas by Kubernetes Deployment; have: by Serve deployment.
    """

    def __init__(self) -> None:
        self.wanted: dict[str, int] = {}
        self.have: dict[str, int] = {}
        self.posted: list[tuple[str, dict[str, Any]]] = []
        self.tokens: set[str | None] = set()
        self.shown: set[str | None] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/api/serve/applications/":
                    outer.shown.add(self.headers.get("Authorization"))
                    running = {name: {"target_num_replicas": number} for name, number in outer.have.items()}
                    self._answer({"applications": {"headrace": {"deployments": running}}} if running
                                 else {"applications": {}})
                    return
                outer.tokens.add(self.headers.get("Authorization"))
                name = self.path.removeprefix("/apis/apps/v1/namespaces/llm/deployments/").removesuffix("/scale")
                number = outer.wanted[name]
                self._answer({"spec": {"replicas": number} if number else {}})  # Kubernetes leaves a 0 out

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.posted.append((self.path, body))
                outer.shown.add(self.headers.get("Authorization"))
                self._answer({"message": "done"})

            def _answer(self, body: dict[str, Any]) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def clusters() -> Iterator[Clusters]:
    both = Clusters()
    thread = threading.Thread(target=both.server.serve_forever, daemon=True)
    thread.start()
    yield both
    both.server.shutdown()
    both.server.server_close()


@pytest.fixture
def scaler(clusters: Clusters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "token").write_text("the-token")
    for variable, value in (
        ("ACCOUNT_FOLDER", str(tmp_path)), ("KUBERNETES_API", clusters.url), ("RAY_DASHBOARD", clusters.url),
        ("RAY_AUTH_TOKEN", "ray-s"),
    ):
        monkeypatch.setenv(variable, value)
    spec = importlib.util.spec_from_file_location("scaler", CHART / "files" / "scaler.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "scaler", module)
    spec.loader.exec_module(module)
    return module


TARGETS = {"scale-a": "HeadraceServer:org--a", "scale-b": "HeadraceServer:b"}


def test_the_scaler_posts_what_differs_and_no_more(scaler: ModuleType, clusters: Clusters) -> None:
    clusters.wanted = {"scale-a": 3, "scale-b": 1}
    clusters.have = {"HeadraceServer:org--a": 1, "HeadraceServer:b": 1, "HeadraceIngress": 1}
    scaler.step("llm", TARGETS)
    path = "/api/v1/applications/headrace/deployments/HeadraceServer%3Aorg--a/scale"
    assert clusters.posted == [(path, {"target_num_replicas": 3})]
    assert (clusters.tokens, clusters.shown) == ({"Bearer the-token"}, {"Bearer ray-s"})


def test_the_scaler_takes_a_missing_number_for_none(scaler: ModuleType, clusters: Clusters) -> None:
    clusters.wanted, clusters.have = {"scale-b": 0}, {"HeadraceServer:b": 2}
    scaler.step("llm", {"scale-b": "HeadraceServer:b"})
    assert [body for _, body in clusters.posted] == [{"target_num_replicas": 0}]


def test_the_scaler_waits_for_an_application_that_is_not_deployed_yet(scaler: ModuleType, clusters: Clusters) -> None:
    clusters.wanted = {"scale-a": 3, "scale-b": 1}
    scaler.step("llm", TARGETS)
    assert clusters.posted == []


def test_the_scaler_goes_on_after_a_failure_and_says_it_once(
    scaler: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "targets.json").write_text(json.dumps(TARGETS))
    monkeypatch.setenv("NAMESPACE", "llm")
    monkeypatch.setattr(sys, "argv", ["scaler.py", str(tmp_path / "targets.json")])
    rounds = iter(["refused", "refused", None, "refused"])

    def step(namespace: str, targets: dict[str, str]) -> None:
        assert (namespace, targets) == ("llm", TARGETS)
        failure = next(rounds, "end")
        if failure == "end":
            raise KeyboardInterrupt
        if failure:
            raise OSError(failure)

    monkeypatch.setattr(scaler, "step", step)
    monkeypatch.setattr(scaler, "PERIOD_S", 0)
    with pytest.raises(KeyboardInterrupt):
        scaler.main()
    assert capsys.readouterr().out.splitlines() == ["not followed: refused"] * 2
