"""Who reaches the chart's pods, under which account they run, and when they may be evicted."""

from __future__ import annotations

from typing import Any

import pytest
from chart_examples import BEFORE, CI, Values, model
from chart_render import app_args, containers, objects, of_kind, pod_specs, ray_service
from helm_python import Chart

ANYBODY: list[Any] = []
RAYS_OWN_PORTS = {6379, 8265, 10001, 52365}


def opened(chart: Chart, values: Values | None = None) -> dict[int, list[Any]]:
    """By port: who reaches it from outside of the release's own pods; `ANYBODY` for everybody."""
    (policy,) = of_kind(objects(chart, values), "NetworkPolicy")
    own, *rules = policy["spec"]["ingress"]
    assert own.keys() == {"from"} and own["from"] == [{"podSelector": policy["spec"]["podSelector"]}]
    found: dict[int, list[Any]] = {}
    for rule in rules:
        for port in rule["ports"]:
            found.setdefault(port["port"], []).append(rule.get("from", ANYBODY))
    return found


def test_the_policy_holds_for_head_and_workers_and_for_no_other_pod(chart: Chart) -> None:
    (policy,) = of_kind(objects(chart), "NetworkPolicy")
    selector = policy["spec"]["podSelector"]
    service = ray_service(chart)["spec"]["rayClusterConfig"]
    for template in (service["headGroupSpec"]["template"], service["workerGroupSpecs"][0]["template"]):
        labels = template["metadata"]["labels"]
        assert labels.items() >= selector["matchLabels"].items()
        assert all(labels[one["key"]] in one["values"] for one in selector["matchExpressions"])
    assert policy["spec"]["policyTypes"] == ["Ingress"], "what pods ask for outside is not limited"


def test_only_the_operator_reaches_a_port_of_ray(chart: Chart) -> None:
    ports = opened(chart)
    (operator,) = ports[8265]
    assert operator == [
        {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
    ]
    assert ports.keys() - {8000, 8080} == {8265} < RAYS_OWN_PORTS
    assert ANYBODY in ports[8000]


def test_the_serve_and_metrics_ports_are_open_to_whom_the_values_say(chart: Chart) -> None:
    (who,) = CI["full"]["networkPolicy"]["serveFrom"]
    ports = opened(chart, CI["full"])
    assert ports.keys() == {8088, 8080, 8265}
    assert ANYBODY not in ports[8088]
    (tests,) = of_kind(objects(chart, CI["full"]), "Pod")
    (given,) = [peers for peers in ports[8088] if who in peers]
    (other,) = [peer for peer in given if peer != who]
    assert other["podSelector"]["matchLabels"].items() <= tests["metadata"]["labels"].items(), "helm test's pod"
    assert 8080 not in opened(chart, {"networkPolicy": {"metricsFrom": []}})


def test_without_the_policy_there_is_a_warning(chart: Chart) -> None:
    values = {"networkPolicy": {"enabled": False}}
    assert of_kind(objects(chart, values), "NetworkPolicy") == []
    (notes,) = (text for path, text in chart.render(values).items() if path.endswith("NOTES.txt"))
    assert "can run code in these pods" in notes


def test_routes_from_outside_lead_to_v1_alone(chart: Chart) -> None:
    manifests = objects(chart, CI["full"])
    (ingress,) = of_kind(manifests, "Ingress")
    (rule,) = ingress["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert (path["path"], path["pathType"]) == ("/v1", "Prefix")
    assert path["backend"] == {"service": {"name": "demo-headrace-serve-svc", "port": {"number": 8088}}}
    assert rule["host"] == ingress["spec"]["tls"][0]["hosts"][0] == "llm.example.org"
    (route,) = of_kind(manifests, "HTTPRoute")
    (rule,) = route["spec"]["rules"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]
    assert rule["backendRefs"] == [{"name": "demo-headrace-serve-svc", "port": 8088}]
    assert route["spec"]["parentRefs"] == CI["full"]["httpRoute"]["parentRefs"]
    assert {one["kind"] for one in objects(chart)} & {"Ingress", "HTTPRoute"} == set()


def test_the_pods_have_an_account_without_rights(chart: Chart) -> None:
    manifests = objects(chart)
    (account,) = of_kind(manifests, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    assert {spec["serviceAccountName"] for spec in pod_specs(ray_service(chart))} == {account["metadata"]["name"]}
    assert of_kind(manifests, "Role") == of_kind(manifests, "RoleBinding") == []


def test_an_existing_account_is_used_and_not_made(chart: Chart) -> None:
    values = CI["existing-secrets"]
    assert of_kind(objects(chart, values), "ServiceAccount") == []
    assert {spec["serviceAccountName"] for spec in pod_specs(ray_service(chart, values))} == {"model-reader"}
    without = {"serviceAccount": {"create": False}}
    assert of_kind(objects(chart, without), "ServiceAccount") == []
    assert all("serviceAccountName" not in spec for spec in pod_specs(ray_service(chart, without)))


def test_where_pods_come_and_go_the_head_has_an_account_that_kuberay_can_bind(chart: Chart) -> None:
    name = "a" * 47  # KubeRay cuts an account's name to 50 characters
    manifests = objects(chart, CI["autoscale"], name)
    accounts = {one["metadata"]["name"] for one in of_kind(manifests, "ServiceAccount")}
    head, worker = pod_specs(ray_service(chart, CI["autoscale"], name))
    assert accounts == {head["serviceAccountName"], worker["serviceAccountName"]}
    assert len(head["serviceAccountName"]) == 50


@pytest.mark.parametrize(
    ("values", "workers", "head"),
    [
        (None, None, None),
        ({"models": [model(4)]}, 3, None),
        ({"models": [model(4)], "podDisruptionBudget": {"minAvailable": 1}}, 1, None),
        ({"podDisruptionBudget": {"minAvailable": 1}}, 1, None),
        ({"models": [model(4)], "podDisruptionBudget": {"enabled": False, "protectHead": True}}, None, None),
        ({"podDisruptionBudget": {"protectHead": True}}, None, 1),
        (CI["keda"], None, None),
    ],
)
def test_budgets(chart: Chart, values: Values | None, workers: int | None, head: int | None) -> None:
    budgets = {
        one["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]: one["spec"]["minAvailable"]
        for one in of_kind(objects(chart, values), "PodDisruptionBudget")
    }
    wanted = {"worker": workers, "head": head}
    assert budgets == {component: number for component, number in wanted.items() if number is not None}


def test_redis_keeps_the_cluster_s_state(chart: Chart) -> None:
    options = ray_service(chart, CI["existing-secrets"])["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert options == {
        "redisAddress": "redis.data.svc:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}},
        "redisUsername": {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "user"}}},
    }, "no namespace in it: two clusters run beside each other during an upgrade"
    assert "gcsFaultToleranceOptions" not in ray_service(chart)["spec"]["rayClusterConfig"]


def test_values_of_the_chart_before_mean_the_same_models(chart: Chart) -> None:
    assert app_args(ray_service(chart, BEFORE)) == app_args(ray_service(chart))
    upgraded = chart.render(BEFORE, name="demo", namespace="llm", is_upgrade=True, revision=2)
    assert upgraded.keys() == chart.render(name="demo", namespace="llm").keys()
    for old, new in zip(containers(ray_service(chart, BEFORE)), containers(ray_service(chart)), strict=True):
        assert old == new
