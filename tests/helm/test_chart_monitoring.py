"""What the chart hands to Prometheus and Grafana, its model cache, `helm test`, and objects of one's own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from chart_examples import CHART, CI, Values, model
from chart_render import Manifest, containers, objects, of_kind, pod_specs, ray_service, reference
from helm_python import Chart

DOWNLOADED = {"claim": {"create": True}, "download": {"enabled": True}}


def test_nothing_is_made_for_an_operator_that_may_be_missing(chart: Chart) -> None:
    kinds = {one["kind"] for one in objects(chart)}
    assert not kinds & {"PodMonitor", "PrometheusRule", "ConfigMap", "ScaledObject"}


def test_prometheus_scrapes_the_metrics_port_of_head_and_workers(chart: Chart) -> None:
    (monitor,) = of_kind(objects(chart, CI["full"]), "PodMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint == {"port": "metrics", "path": "/metrics", "interval": "10s"}
    (policy,) = of_kind(objects(chart, CI["full"]), "NetworkPolicy")
    assert monitor["spec"]["selector"] == policy["spec"]["podSelector"]
    for container in containers(ray_service(chart, CI["full"])):
        assert {"name": "metrics", "containerPort": 8080} in container["ports"]
    groups = ray_service(chart, CI["full"])["spec"]["rayClusterConfig"]
    for group in (groups["headGroupSpec"], *groups["workerGroupSpecs"]):
        assert group["rayStartParams"]["metrics-export-port"] == "8080"


def test_the_rules_are_the_file_s_with_the_runbook_where_the_site_has_it(chart: Chart) -> None:
    (rule,) = of_kind(objects(chart, CI["full"]), "PrometheusRule")
    text = (CHART / "files" / "rules.yaml").read_text("utf-8")
    ours = yaml.safe_load(text)["groups"]
    assert len(rule["spec"]["groups"]) == len(ours)
    alerts = 0
    for group, own in zip(rule["spec"]["groups"], ours, strict=True):
        for one, given in zip(group["rules"], own["rules"], strict=True):
            if "alert" in given:
                alerts += 1
                url = given["annotations"].pop("runbook_url")
                assert url.startswith("docs/runbook.md#")
                assert one["annotations"].pop("runbook_url") == url.replace(
                    "docs/runbook.md", "https://docs.example.org/runbook.html"
                )
            assert one == given
    assert alerts > 5


def test_the_dashboard_is_the_file(chart: Chart) -> None:
    folders = of_kind(objects(chart, CI["full"]), "ConfigMap")
    (folder,) = [one for one in folders if "headrace.json" in one.get("data", {})]
    assert folder["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(folder["data"]["headrace.json"]) == json.loads(
        (CHART / "files" / "grafana-dashboard.json").read_text("utf-8")
    )


# --- the model cache --------------------------------------------------------------------------------------------


def download(chart: Chart, values: Values) -> Manifest:
    (job,) = of_kind(objects(chart, values), "Job")
    return job


def test_a_claim_of_the_chart_is_mounted_and_stays(chart: Chart) -> None:
    (claim,) = of_kind(objects(chart, CI["gpu"]), "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert claim["spec"]["storageClassName"] == "filestore"
    _, worker = pod_specs(ray_service(chart, CI["gpu"]))
    volumes = {volume["name"]: volume for volume in worker["volumes"]}
    assert volumes["model-cache"]["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}


def test_the_models_are_downloaded_from_the_hub_and_nothing_else(chart: Chart) -> None:
    sources: list[Any] = ["org/one", "./here", "/there", "s3://bucket/two", {"bucket_uri": "gs://three"}, "~/x"]
    models = [{"model_loading_config": {"model_id": f"m{n}", "model_source": one}} for n, one in enumerate(sources)]
    values = {"models": [*models, model()], "modelCache": DOWNLOADED}
    spec = download(chart, values)["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["command"][4:] == ["org/one", "m"]
    assert container["env"][0] == {"name": "HF_HOME", "value": "/model-cache"}
    assert "serviceAccountName" not in spec, "the chart's account may not be there yet"
    assert of_kind(objects(chart, {"models": models[1:], "modelCache": DOWNLOADED}), "Job") == []


@pytest.mark.parametrize(
    ("values", "hook"),
    [
        (CI["existing-secrets"], "pre-install,pre-upgrade"),
        ({"modelCache": {"existingClaim": "c", "download": {"enabled": True}}}, "pre-install,pre-upgrade"),
        # The token's Secret, or the claim, is made by the same installation.
        ({"modelCache": {"existingClaim": "c", "download": {"enabled": True}}, "auth": {"hfToken": "t"}},
         "post-install,post-upgrade"),
        (CI["gpu"], "post-install,post-upgrade"),
    ],
    ids=["all-exist", "no-token", "own-token", "own-claim"],
)
def test_the_download_comes_first_where_what_it_needs_is_there(chart: Chart, values: Values, hook: str) -> None:
    assert download(chart, values)["metadata"]["annotations"]["helm.sh/hook"] == hook


def test_the_download_has_the_token(chart: Chart) -> None:
    (container,) = download(chart, CI["existing-secrets"])["spec"]["template"]["spec"]["containers"]
    assert {"name": "HF_TOKEN", "valueFrom": reference("llm-keys", "token")} in container["env"]


# --- helm test, and objects of one's own ------------------------------------------------------------------------


def test_helm_test_asks_every_model(chart: Chart) -> None:
    (pod,) = of_kind(objects(chart, CI["gpu"]), "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    asked = []
    for container in pod["spec"]["containers"]:
        *_, script, body = container["command"]
        assert "http://demo-headrace-serve-svc:8000/v1/chat/completions" in script
        asked.append(json.loads(body)["model"])
        (key,) = container["env"]
        assert key == {"name": "HEADRACE_API_KEY", "valueFrom": reference("demo-headrace-auth", "api-key")}
    assert asked == ["llama-3-70b", "llama-3-8b"]
    assert of_kind(objects(chart, {"tests": {"enabled": False}}), "Pod") == []


def test_objects_of_one_s_own_are_templates(chart: Chart) -> None:
    names = {one["metadata"]["name"]: one for one in of_kind(objects(chart, CI["full"]), "ConfigMap")}
    assert names["demo-headrace-site"]["data"] == {"namespace": "llm"}
    assert "as-text" in names


def test_what_is_one_s_own_reaches_both_kinds_of_pods(chart: Chart) -> None:
    service = ray_service(chart, CI["full"])
    for spec in pod_specs(service):
        container = spec["containers"][0]
        assert {"name": "profiles", "configMap": {"name": "profiles"}} in spec["volumes"]
        assert {"name": "profiles", "mountPath": "/profiles", "readOnly": True} in container["volumeMounts"]
        assert container["envFrom"] == [{"configMapRef": {"name": "site"}}]
        given = [one["value"] for one in container["env"] if one["name"] == "RAY_USAGE_STATS_ENABLED"]
        assert given == ["1"], "one's own goes before the chart's"
    groups = service["spec"]["rayClusterConfig"]
    for template in (groups["headGroupSpec"]["template"], groups["workerGroupSpecs"][0]["template"]):
        assert template["metadata"]["labels"]["team"] == "inference"
        assert template["metadata"]["annotations"] == {"example.org/scrape": "no"}
    assert service["metadata"]["annotations"] == {"ray.io/initializing-timeout": "30m"}
    ours = [one["metadata"]["labels"] for one in objects(chart, CI["full"]) if "labels" in one["metadata"]]
    assert len(ours) > 8 and all(labels["team"] == "inference" for labels in ours)


def test_probes_ask_what_kuberay_s_own_ask(chart: Chart) -> None:
    head, worker = containers(ray_service(chart, CI["full"]))
    raylet, gcs, proxy = ":52365/api/local_raylet_healthz", ":8265/api/gcs_healthz", ":8088/-/healthz"
    for container, probe, asked in (
        (head, "livenessProbe", [raylet, gcs]), (head, "readinessProbe", [raylet, gcs]),
        (worker, "livenessProbe", [raylet]), (worker, "readinessProbe", [raylet, proxy]),
    ):
        *_, script = container[probe]["exec"]["command"]
        assert [one for one in (raylet, gcs, proxy) if one in script] == asked
        assert script.count("grep -q success") == len(asked)
        assert container[probe]["timeoutSeconds"] > 2 * len(asked), "wget gives up before Kubernetes does"
