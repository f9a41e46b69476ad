"""Values of the Helm chart that its tests render, and the configuration that each of them means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[1] / "helm" / "headrace"
CI = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted((CHART / "ci").glob("*.yaml"))}
"""The chart's own examples of values, by their names."""
BEFORE = yaml.safe_load((Path(__file__).parent / "helm" / "values-before.yaml").read_text("utf-8"))
"""All values of the chart as it was before it had more than a RayService and a Secret."""

HF_TOKEN = "hf_the-token-of-this-test"
API_KEY = "sk-the-key-of-this-test"

Values = dict[str, Any]

SPREAD = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule"}

# Every value of pods and configuration set to something other than its default, but for controller.enabled, without
# which targets are refused.
EVERYTHING: Values = {
    "fullnameOverride": "llama",
    "image": {"repository": "registry.example/headrace", "tag": "1.2.3", "pullPolicy": "Always"},
    "imagePullSecrets": [{"name": "registry-key"}],
    "serviceAccountName": "serving",
    "ray": {"version": "2.60.1", "authentication": {"enabled": False}},
    "upgradeStrategy": "None",
    "models": [
        {
            "model_loading_config": {"model_id": "llama", "model_source": "/models/llama"},
            "accelerator_type": "H100",
            "deployment_config": {"num_replicas": 3},
            "engine_kwargs": {
                "max_model_len": 1048576, "max_num_seqs": 64, "gpu_memory_utilization": 0.5, "dtype": "bfloat16",
                "enforce_eager": False, "kv_cache_dtype": "fp8", "limit_mm_per_prompt": {"image": 0},
            },
            "headrace": {
                "thresholds": {"policy": "fcfs"}, "targets": {"tpot_s": None, "latency_s": 20.5}, "drain_s": 30,
                "max_wait_s": None, "limits": {"max_tokens": 500, "choices": 4},
                "controller": {"profile": "a100-llama2-7b", "window_s": 60.0}, "scheduler": "own_policy.OwnScheduler",
            },
        },
        {
            "model_loading_config": {"model_id": "large"},
            "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 2}},
            "engine_kwargs": {"tensor_parallel_size": 2, "enable_lora": True},
            "lora_config": {"dynamic_lora_loading_path": "s3://bucket/adapters"},
        },
    ],
    "gpu": {"perWorker": 2, "product": "NVIDIA-H100-80GB-HBM3"},
    "targets": {"ttftSeconds": 3, "tpotSeconds": 0.08, "latencySeconds": None},
    "tenants": [
        {"name": "red", "weight": 3, "secretName": "keys", "secretKey": "red"},
        {"name": "blue", "secretName": "keys", "secretKey": "blue"},
    ],
    "policy": {"name": "wait", "maxHoldSeconds": 1},
    "controller": {"enabled": True, "periodSeconds": 0.5, "profile": "a100-llama2-7b-paper"},
    "headrace": {
        "drain_s": 90.5, "engine_timeout_s": 20, "max_wait_s": None,
        "limits": {
            "concurrent_requests": None, "requests_per_minute": 600, "tokens_per_minute": 1000000,
            "keys": {"blue": {"concurrent_requests": 2}, "red": {"tokens_per_minute": 100000}},
            "choices": 2, "max_tokens": 1000, "prompt_tokens": 3000,
            "body_bytes": 1048576, "header_bytes": 8192, "json_depth": 32, "body_s": 30, "chunk_s": 5,
            "cors_origins": ["https://pages.example"], "front_door": False,
        },
    },
    "service": {"type": "LoadBalancer", "port": 8088, "annotations": {"example.com/internal": "true"}},
    "auth": {"hfToken": HF_TOKEN, "apiKey": API_KEY},
    "env": [
        {"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"},
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ],
    "shm": {"sizeLimit": 17179869184},
    "modelCache": {"mountPath": "/models", "existingClaim": "models", "sizeLimit": "1Gi"},
    "podSecurityContext": {"fsGroup": 2000},
    "head": {
        "resources": {"requests": {"cpu": 4, "memory": "4Gi"}, "limits": {"cpu": "4500m", "memory": "4Gi"}},
        "nodeSelector": {"pool": "cpu"},
        "tolerations": [{"key": "cpu-only", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        "priorityClassName": "high",
        "topologySpreadConstraints": [SPREAD],
    },
    "worker": {
        "resources": {"requests": {"cpu": "12"}, "limits": {"memory": "96Gi"}},
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "dedicated", "value": "llm", "effect": "NoExecute", "tolerationSeconds": 60}],
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": []}},
        "priorityClassName": "high",
        "topologySpreadConstraints": [SPREAD],
    },
}


def model(replicas: Any = None, **entry: Any) -> Values:
    deployment = {} if replicas is None else {"num_replicas": replicas}
    return {"model_loading_config": {"model_id": "m"}, "deployment_config": deployment} | entry


EXAMPLES: dict[str, Values | None] = {
    "defaults": None,
    "everything": EVERYTHING,
    "one-model": {"models": [model()]},
    "many-replicas": {"models": [model(1024)]},
    "autoscaled": {"models": [model(deployment_config={
        "autoscaling_config": {"min_replicas": 1, "max_replicas": 2}, "max_ongoing_requests": 64})]},
    "two-models": {"models": [
        model(headrace={"targets": {"ttft_s": 1}, "drain_s": 5}),
        {"model_loading_config": {"model_id": "org/n-1.5", "model_source": "org/n"}},
    ]},
    "engine": {"models": [model(engine_kwargs={
        "max_model_len": 1048576, "max_num_seqs": 1, "enforce_eager": True})]},
    "tensor-parallel": {"models": [model(engine_kwargs={"tensor_parallel_size": 2}, placement_group_config={
        "bundle_per_worker": {"CPU": 1, "GPU": 1}, "strategy": "PACK"})]},
    "adapters": {"models": [model(lora_config={"dynamic_lora_loading_path": "s3://bucket/adapters"})]},
    **{f"policy-{policy}": {"policy": {"name": policy}} for policy in ("fcfs", "wait", "nested_wait", "wait_cp")},
    "no-hold": {"policy": {"name": "fcfs", "maxHoldSeconds": 0}},
    "longest-hold": {"policy": {"name": "wait", "maxHoldSeconds": 60}},
    # Thresholds that name a policy are taken whole, others field by field.
    "thresholds-of-each": {"policy": {"name": "wait", "maxHoldSeconds": 1}, "models": [
        model(headrace={"thresholds": {"max_hold_s": 2}}),
        model(headrace={"thresholds": {"policy": "fcfs"}}) | {"model_loading_config": {"model_id": "n"}},
    ]},
    "targets": {"targets": {"ttftSeconds": 3, "tpotSeconds": 0.08}},
    "latency": {"targets": {"latencySeconds": 20.5}},
    "tenants": {"tenants": [{"name": "a", "weight": 3, "secretName": "s", "secretKey": "k"},
                            {"name": "b", "secretName": "s", "secretKey": "l"}]},
    "no-controller": {"controller": {"enabled": False, "periodSeconds": 3600, "profile": "a100-llama2-7b-paper"}},
    "quick-controller": {"controller": {"periodSeconds": 0.001}},
    "waits-without-end": {"headrace": {"drain_s": 0, "engine_timeout_s": 3600, "max_wait_s": None}},
    "unlimited": {"headrace": {"limits": {
        "concurrent_requests": None, "keys": {"operator": {"concurrent_requests": None}}}}},
    "port": {"service": {"port": 65535}},
    **{f"ci-{name}": values for name, values in CI.items() if name != "keda"},
    "before": BEFORE,
}


def configuration(values: Values | None) -> dict[str, Any]:
    """What values mean, as a configuration that `headrace render` reads."""
    given = _over(yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")), values or {})
    targets, policy, controller = given["targets"], given["policy"], given["controller"]
    tenants = [
        {"name": one["name"], "weight": one.get("weight", 1), "api_key_env": f"HEADRACE_TENANT_KEY_{index}"}
        for index, one in enumerate(given["tenants"])
    ]
    logs, tracing = given["logging"], given["tracing"]
    headrace = given["headrace"] | {
        "targets": {f"{name}_s": targets[f"{name}Seconds"] for name in ("ttft", "tpot", "latency")},
        "tenants": tenants,
        "thresholds": {"policy": policy["name"], "max_hold_s": policy["maxHoldSeconds"]},
        "controller": {
            "enabled": controller["enabled"], "period_s": controller["periodSeconds"],
            "profile": controller["profile"],
        },
    }
    if tracing["otlpEndpoint"]:
        headrace["tracing"] = {
            "otlp_endpoint": tracing["otlpEndpoint"], "sampling_ratio": tracing["samplingRatio"],
        }
    return {
        "http_options": {"host": "0.0.0.0", "port": given["service"]["port"]},
        "logging_config": {
            "encoding": logs["encoding"], "log_level": logs["level"], "enable_access_log": logs["accessLog"],
        },
        "applications": [{"args": {"llm_configs": given["models"], "headrace": headrace}}],
    }


def _over(default: Any, given: Any) -> Any:
    """Values over the chart's default: objects key by key."""
    if not (isinstance(default, Mapping) and isinstance(given, Mapping)):
        return given
    return {**default, **{key: _over(default.get(key), value) for key, value in given.items()}}
