"""The chart's values.schema.json: typos and values out of range are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from chart_examples import CHART, Values, model
from chart_render import nested, objects
from helm_python import Chart, HelmRenderError, HelmValuesError


def typos() -> list[tuple[Values, str]]:
    """One misspelt key in every mapping of values.yaml with fixed keys."""
    free_form = {
        "annotations", "nodeSelector", "keys", "labels", "commonLabels", "podLabels", "podAnnotations", "models",
    }

    def mappings(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if isinstance(value, dict) and not (path and path[-1] in free_form):
            yield path
            for key, child in value.items():
                yield from mappings(child, (*path, key))

    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    return [(nested(".".join((*path, "replicaz")), "x"), ".".join(path)) for path in mappings(defaults, ())]


@pytest.mark.parametrize(("values", "path"), [pytest.param(*typo, id=typo[1] or "root") for typo in typos()])
def test_misspelt_key_is_rejected_by_name(chart: Chart, values: Values, path: str) -> None:
    with pytest.raises(HelmValuesError) as error:
        chart.render(values)
    assert f"at '{'/' + path.replace('.', '/') if path else ''}'" in str(error.value)
    assert "'replicaz' not allowed" in str(error.value)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (nested("headrace.limits.keys", {"team-a": {"requests": 1}}), "'requests'"),
        ({"models": [model(headrace={"target": {}})]}, "'target'"),
        ({"models": [model(headrace={"targets": {"ttft": 1}})]}, "'ttft'"),
        ({"models": [model(headrace={"controller": {"period": 1}})]}, "'period'"),
        (nested("env", [{"name": "A", "valu": "x"}]), "'valu'"),
        (nested("worker.tolerations", [{"keys": "x"}]), "'keys'"),
        (nested("imagePullSecrets", [{"nam": "x"}]), "'nam'"),
        (nested("head.affinity", {"nodeAffinit": {}}), "'nodeAffinit'"),
        (nested("podSecurityContext", {"fsgroup": 1}), "'fsgroup'"),
        (nested("podSecurityContext.seccompProfile", {"type": "RuntimeDefault", "profile": "x"}), "'profile'"),
        (nested("env", [{"name": "A", "valueFrom": {"secretRef": {}}}]), "'secretRef'"),
        (nested("env", [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "k": 1}}}]), "'k'"),
        (nested("env", [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "s", "key": "k", "k": 1}}}]), "'k'"),
        (nested("env", [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "p", "path": 1}}}]), "'path'"),
        (nested("env", [{"name": "A", "valueFrom": {"resourceFieldRef": {"resource": "r", "unit": 1}}}]), "'unit'"),
    ],
)
def test_misspelt_key_in_an_optional_structure_is_rejected(chart: Chart, values: Values, named: str) -> None:
    with pytest.raises(HelmValuesError, match=f"{named} not allowed"):
        chart.render(values)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("models", []),
        ("models", {}),
        ("models", None),
        ("gpu.perWorker", -1),
        ("gpu.workers", 0),
        ("targets.ttftSeconds", 0),
        ("targets.tpotSeconds", "fast"),
        ("tenants", "red"),
        ("policy.name", "lifo"),
        ("policy.maxHoldSeconds", -0.1),
        ("policy.maxHoldSeconds", 61),
        ("controller.periodSeconds", 0),
        ("controller.periodSeconds", 3601),
        ("controller.enabled", "yes"),
        ("headrace.drain_s", -1),
        ("headrace.drain_s", 86401),
        ("headrace.engine_timeout_s", 0),
        ("headrace.max_wait_s", 0),
        ("headrace.limits.choices", 0),
        ("headrace.limits.json_depth", 191),
        ("headrace.limits.body_s", "long"),
        ("headrace.limits.cors_origins", "*"),
        ("headrace.limits.keys.team-a.requests_per_minute", 0.5),
        ("image.repository", ""),
        ("image.pullPolicy", "Sometimes"),
        ("ray.version", 2.6),
        ("service.type", "ExternalName"),
        ("service.port", 0),
        ("service.port", 70000),
        ("service.port", 8265),  # Ray's dashboard
        ("upgradeStrategy", "Always"),
        ("incrementalUpgrade.stepSizePercent", 101),
        ("gcsFaultTolerance.redisAddress", "redis"),
        ("autoscaling.mode", "both"),
        ("autoscaling.idleTimeoutSeconds", 0),
        ("keda.minReplicas", 0),
        ("keda.idleReplicas", 1),  # KEDA's own limit
        ("keda.serverAddress", "prometheus:9090"),
        ("logging.level", "LOUD"),
        ("tracing.samplingRatio", 2),
        ("tracing.otlpEndpoint", "collector:4317"),
        ("ingress.hosts", "llm.example.org"),
        ("podLabels.team", "a team"),
        ("probes.liveness.periodSeconds", 0),
        ("podDisruptionBudget.minAvailable", "50%"),
        ("networkPolicy.operatorFrom", []),
        ("networkPolicy.metricsFrom", ["monitoring"]),
        ("monitoring.port", 6379),
        ("monitoring.podMonitor.interval", "often"),
        ("modelCache.claim.accessModes", ["ReadOnlyMany"]),
        ("scratch.sizeLimit", "lots"),
        ("extraVolumes", [{"name": "x"}, {"emptyDir": {}}]),
        ("shm.sizeLimit", "16 GB"),
        ("modelCache.mountPath", "cache"),
        ("gpu.product", "NVIDIA A100"),  # a label value has no spaces
        ("fullnameOverride", "Headrace"),
        ("fullnameOverride", "a" * 48),
        ("auth.existingSecret", "My Secret"),
        ("worker.resources.limits.cpu", 0.5),  # the API takes integers and strings
    ],
)
def test_bad_value_is_rejected_by_path(chart: Chart, path: str, value: Any) -> None:
    with pytest.raises(HelmValuesError) as error:
        chart.render(nested(path, value))
    # A null removes the default, so that the key is missing from its parent.
    expected = f"missing property '{path}'" if value is None else f"at '/{path.replace('.', '/')}'"
    assert expected in str(error.value) or f"{expected[:-1]}/" in str(error.value)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        # gpu.perWorker says how many.
        (nested("worker.resources", {"limits": {"nvidia.com/gpu": 2}}), "nvidia.com/gpu"),
        ({"models": [model(engine_kwargs={"scheduler_cls": "x"})]}, "scheduler_cls"),
        ({"models": [model(engine_kwargs={"max-num-seqs": 1})]}, "max-num-seqs"),
        ({"models": [model(deployment_config={"user_config": {}})]}, "user_config"),
        ({"models": [model(server_cls="x")]}, "'server_cls' not allowed"),
        ({"models": [model(acelerator_type="A100")]}, "'acelerator_type' not allowed"),
        ({"models": [{"model_loading_config": {}}]}, "missing property 'model_id'"),
        ({"models": [model(0)]}, "/models/0/deployment_config/num_replicas"),
        ({"models": [model("auto")]}, "/models/0/deployment_config/num_replicas"),
        ({"tenants": [{"name": "a", "secretName": "s"}]}, "'secretKey'"),
        ({"extraVolumes": [{"name": "tmp", "emptyDir": {}}]}, "/extraVolumes/0/name"),
        ({"extraEnv": [{"name": "REDIS_PASSWORD", "value": "x"}]}, "/extraEnv/0/name"),
    ],
)
def test_value_that_contradicts_another_is_rejected(chart: Chart, values: Values, named: str) -> None:
    with pytest.raises(HelmValuesError, match=named):
        chart.render(values)


def test_chart_works_below_a_parent_chart(chart: Chart) -> None:
    # Helm hands every subchart a `global` mapping.
    key = {"auth": {"apiKey": "the same in both"}, "ray": {"authentication": {"existingSecret": "ours"}}}
    assert objects(chart, {"global": {"anything": 1}} | key) == objects(chart, key)


AUTOSCALED = model(deployment_config={"autoscaling_config": {"max_replicas": 2}})
INCREMENTAL = {"upgradeStrategy": "NewClusterWithIncrementalUpgrade"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"models": [AUTOSCALED], "autoscaling": {"mode": "keda"}},
         "autoscaling.mode keda and deployment_config.autoscaling_config of m exclude each other"),
        ({"autoscaling": {"mode": "ray"}}, "no model has a deployment_config.autoscaling_config"),
        ({"autoscaling": {"mode": "keda"}, "keda": {"models": {"other": {}}}}, 'no model has the model_id "other"'),
        ({"autoscaling": {"mode": "keda"}, "keda": {"minReplicas": 5}}, "minReplicas 5 of llama-2-7b is more than"),
        ({"models": [model(), model()]}, "two have the same model_id"),
        (INCREMENTAL, "set autoscaling.mode to ray"),
        (INCREMENTAL | {"autoscaling": {"mode": "ray"}}, "needs incrementalUpgrade.gatewayClassName"),
        (INCREMENTAL | {"autoscaling": {"mode": "ray"}, "incrementalUpgrade": {"gatewayClassName": "istio"},
                        "auth": {"generateApiKey": False}}, "forwards /admin"),
        ({"tenants": [{"name": "a b"}, {"name": "a-b"}]}, "two names are the same"),
        ({"modelCache": {"existingClaim": "c", "claim": {"create": True}}}, "exclude each other"),
        ({"modelCache": {"download": {"enabled": True}}}, "needs a claim"),
        ({"ingress": {"enabled": True}}, "needs ingress.hosts"),
        ({"httpRoute": {"enabled": True}}, "needs httpRoute.parentRefs"),
        ({"service": {"port": 8080}}, "service.port and monitoring.port are the same"),
    ],
)
def test_values_that_exclude_each_other_are_refused_in_a_sentence(chart: Chart, values: Values, said: str) -> None:
    with pytest.raises(HelmRenderError) as error:
        chart.render(values)
    assert said in str(error.value)
