"""What the Helm chart renders is a configuration that the application accepts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import Chart

from cluster.config import AppConfig, ClusterConfig
from scheduler.tuning.slo import Slo

CHART = Path(__file__).resolve().parents[2] / "helm" / "headrace"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


@pytest.fixture(scope="module")
def chart() -> Iterator[Chart]:
    with Chart.load(CHART) as loaded:
        yield loaded


def model(**entry: Any) -> dict[str, Any]:
    return {"model_loading_config": {"model_id": "m"}, **entry}


def serve_config(chart: Chart, values: dict[str, Any] | None) -> dict[str, Any]:
    rendered = chart.render(values, name="demo", namespace="llm")
    documents = [
        document for path, text in rendered.items() if path.endswith(".yaml") for document in yaml.safe_load_all(text)
    ]
    (service,) = [document for document in documents if document and document["kind"] == "RayService"]
    return yaml.safe_load(service["spec"]["serveConfigV2"])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "values",
    [
        None,
        {"models": [model()]},
        {"models": [model(deployment_config={"num_replicas": 1024})]},
        {"models": [model(headrace={"targets": {"ttft_s": 1}, "drain_s": 5}), {"model_loading_config": {
            "model_id": "n", "model_source": "org/n"}}]},
        {"models": [model(engine_kwargs={"max_model_len": 1048576, "max_num_seqs": 1, "enforce_eager": True})]},
        {"models": [model(engine_kwargs={"tensor_parallel_size": 2}, placement_group_config={
            "bundle_per_worker": {"CPU": 1, "GPU": 1}, "strategy": "PACK"})]},
        {"models": [model(lora_config={"dynamic_lora_loading_path": "s3://bucket/adapters"})]},
        {"policy": {"name": "fcfs", "maxHoldSeconds": 0}},
        {"policy": {"name": "wait", "maxHoldSeconds": 60}},
        {"targets": {"ttftSeconds": 3, "tpotSeconds": 0.08}},
        {"targets": {"latencySeconds": 20.5}},
        {"tenants": [{"name": "a", "weight": 3, "secretName": "s", "secretKey": "k"},
                     {"name": "b", "secretName": "s", "secretKey": "l"}]},
        {"controller": {"enabled": False, "periodSeconds": 3600, "profile": "a100-llama2-7b-paper"}},
        {"controller": {"periodSeconds": 0.001}},
        {"service": {"port": 65535}},
    ],
    ids=str,
)
def test_whatever_the_chart_accepts_the_application_accepts(chart: Chart, values: dict[str, Any] | None) -> None:
    rendered = serve_config(chart, values)
    config = ClusterConfig.model_validate(rendered)
    args = AppConfig.model_validate(rendered["applications"][0]["args"])
    assert config.application.args == args
    assert config.http_options.host == "0.0.0.0"
    assert args.llm_configs
    for entry in args.llm_configs:
        thresholds = args.settings_of(entry.model_id).thresholds
        if values and "policy" in values:
            assert thresholds.policy == values["policy"]["name"]
            assert thresholds.max_hold_s == values["policy"]["maxHoldSeconds"]


def test_the_chart_s_default_is_the_shipped_gpu_configuration(chart: Chart) -> None:
    shipped = yaml.safe_load((CHART.parents[1] / "configs" / "a100.yaml").read_text())["applications"][0]["args"]
    args = AppConfig.model_validate(serve_config(chart, None)["applications"][0]["args"])
    (entry,), (given,) = args.llm_configs, shipped["llm_configs"]
    assert entry.own.keys() == given.keys()
    for key in ("model_loading_config", "accelerator_type", "deployment_config"):
        assert entry.own[key] == given[key]
    assert args.headrace.controller.profile == shipped["headrace"]["controller"]["profile"]
    assert args.headrace.thresholds.policy == "fluid"


def test_every_key_of_the_chart_is_a_key_of_the_application(chart: Chart) -> None:
    targets = {"ttftSeconds": 3, "tpotSeconds": 0.08, "latencySeconds": 9}
    args = AppConfig.model_validate(serve_config(chart, {"targets": targets})["applications"][0]["args"])
    assert args.headrace.targets == Slo(3, 0.08, 9)


def test_a_model_s_keys_are_ray_s_less_what_the_application_sets() -> None:
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig

    keys = SCHEMA["properties"]["models"]["items"]["properties"].keys()
    assert keys == (LLMConfig.model_fields.keys() - {"server_cls"}) | {"headrace"}
    loading = SCHEMA["properties"]["models"]["items"]["properties"]["model_loading_config"]["properties"].keys()
    assert loading == {"model_id", "model_source", "tokenizer_source"}
