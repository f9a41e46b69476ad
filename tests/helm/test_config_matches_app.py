"""What the Helm chart renders for Serve means what `headrace render` prints for the same configuration."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
import yaml
from chart_examples import CHART, EVERYTHING, EXAMPLES, configuration, model
from chart_render import ray_service, serve_config
from helm_python import Chart

from cluster.config import AppConfig, ClusterConfig, LoggingConfig
from cluster.live import live_settings
from cluster.serve_file import INGRESS, deployment_name, serve_file
from cluster.settings import ControllerConfig, ModelSettings
from replicas.live_settings import engine_settings
from router.limits import FOR_ALL, KeyLimits, Limits
from router.tenants import TenantConfig
from scheduler.tuning.slo import Slo

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
CHANGED = {
    "targets": {"ttftSeconds": 9, "tpotSeconds": 0.9, "latencySeconds": 99},
    "policy": {"name": "fluid", "maxHoldSeconds": 2},
    "headrace": {"drain_s": 7, "engine_timeout_s": 7, "max_wait_s": 7, "limits": {"choices": 7, "json_depth": 7}},
    "tenants": [{"name": "t", "secretName": "s", "secretKey": "k"}],
}
"""Values that need no restart."""


def application(chart: Chart, values: dict[str, Any] | None) -> dict[str, Any]:
    (one,) = serve_config(ray_service(chart, values))["applications"]
    return one  # type: ignore[no-any-return]


def meaning(config: dict[str, Any]) -> dict[str, Any]:
    """Serve's file with every setting checked and every default removed."""
    (app,) = config["applications"]
    args = AppConfig.model_validate(app["args"])
    ingress, *models = app["deployments"]
    told = ingress["user_config"]
    assert ingress["name"] == INGRESS and told.keys() == {"tenants", "models"}
    return {
        "http": config["http_options"],
        "logs": LoggingConfig.model_validate(config["logging_config"]),
        "tracing": args.headrace.tracing,
        "ingress options": args.ingress_deployment_config,
        "application": {key: app[key] for key in ("name", "import_path", "route_prefix")},
        "args": app["args"].keys(),
        "entries": [entry.own for entry in args.llm_configs],
        "engines": {entry.model_id: args.settings_of(entry.model_id) for entry in args.llm_configs},
        "ingress": {key: value for key, value in ingress.items() if key != "user_config"},
        "tenants": [TenantConfig.model_validate(tenant) for tenant in told["tenants"]],
        "models": {name: live_settings(ModelSettings.model_validate(own)) for name, own in told["models"].items()},
        "deployments": [
            one | {"user_config": live_settings(ModelSettings.model_validate(one["user_config"]))} for one in models
        ],
        "taken by the engines": [engine_settings(one["user_config"]) for one in models],
    }


@pytest.mark.parametrize("values", EXAMPLES.values(), ids=EXAMPLES)
def test_the_chart_renders_what_headrace_render_prints(chart: Chart, values: dict[str, Any] | None) -> None:
    rendered = serve_config(ray_service(chart, values))
    printed = serve_file(ClusterConfig.model_validate(configuration(values)))
    assert meaning(rendered) == meaning(printed)


@pytest.mark.parametrize("values", EXAMPLES.values(), ids=EXAMPLES)
def test_the_ingress_and_the_replicas_are_told_the_same_to_the_letter(
    chart: Chart, values: dict[str, Any] | None
) -> None:
    # An operator's change is kept under a digest of the settings that it replaces, as both were told them.
    app = application(chart, values)
    ingress, *models = app["deployments"]
    told = {one["name"]: one["user_config"] for one in models}
    assert told == {deployment_name(name): own for name, own in ingress["user_config"]["models"].items()}


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_settings_and_replicas_are_not_in_the_args(chart: Chart, values: dict[str, Any]) -> None:
    # Serve rebuilds and restarts everything whose args change.
    models = configuration(values)["applications"][0]["args"]["llm_configs"]
    scaled = [
        entry | {
            "deployment_config": {"num_replicas": 9},
            "headrace": entry.get("headrace", {}) | {"targets": {"ttft_s": 8}, "thresholds": {"policy": "wait"}},
        }
        for entry in models
    ]
    controller = values.get("controller", {}) | {"periodSeconds": 7}
    changed = values | CHANGED | {"controller": controller, "models": scaled}
    before, after = application(chart, values), application(chart, changed)
    assert before["args"] == after["args"]
    for old, new in zip(before["deployments"], after["deployments"], strict=True):
        assert old["name"] == new["name"] and old["user_config"] != new["user_config"]
    assert [one["num_replicas"] for one in after["deployments"][1:]] == [9] * len(models)


def test_another_engine_changes_the_args(chart: Chart) -> None:
    first, second = ({"models": [model(engine_kwargs={"max_num_seqs": most})]} for most in (8, 16))
    assert application(chart, first)["args"] != application(chart, second)["args"]


def test_the_chart_s_default_is_the_shipped_gpu_configuration(chart: Chart) -> None:
    shipped = yaml.safe_load((CHART.parents[1] / "configs" / "a100.yaml").read_text())["applications"][0]["args"]
    app = application(chart, None)
    args = AppConfig.model_validate(app["args"])
    (entry,), (given,) = args.llm_configs, shipped["llm_configs"]
    assert entry.own.keys() == given.keys()
    for key in ("model_loading_config", "accelerator_type"):
        assert entry.own[key] == given[key]
    _, deployment = app["deployments"]
    assert deployment["num_replicas"] == given["deployment_config"]["num_replicas"]
    told = ModelSettings.model_validate(deployment["user_config"])
    assert told.controller.profile == shipped["headrace"]["controller"]["profile"]
    assert told.thresholds.policy == "fluid"


def test_without_values_every_setting_has_the_application_s_default(chart: Chart) -> None:
    _, deployment = application(chart, None)["deployments"]
    told = ModelSettings.model_validate(deployment["user_config"])
    assert live_settings(told) == {"controller": {"profile": "a100-llama2-7b"}}


def test_every_key_of_the_chart_is_a_key_of_the_application(chart: Chart) -> None:
    targets = {"ttftSeconds": 3, "tpotSeconds": 0.08, "latencySeconds": 9}
    _, deployment = application(chart, {"targets": targets})["deployments"]
    assert ModelSettings.model_validate(deployment["user_config"]).targets == Slo(3, 0.08, 9)


def test_the_settings_of_the_schema_are_the_application_s() -> None:
    settings = SCHEMA["definitions"]["modelSettings"]["properties"]
    assert settings.keys() == ModelSettings.model_fields.keys()
    assert settings["targets"]["properties"].keys() == {field.name for field in fields(Slo)}
    assert settings["controller"]["properties"].keys() == ControllerConfig.model_fields.keys()
    assert settings["limits"]["properties"].keys() == Limits.model_fields.keys() - FOR_ALL
    limits = SCHEMA["definitions"]["limits"]["properties"]
    assert limits.keys() == Limits.model_fields.keys()
    assert limits["keys"]["additionalProperties"]["properties"].keys() == KeyLimits.model_fields.keys()
    default = yaml.safe_load((CHART / "values.yaml").read_text())["headrace"]
    assert default.keys() == SCHEMA["properties"]["headrace"]["properties"].keys()
    assert default["limits"].keys() == Limits.model_fields.keys()


def test_a_model_s_keys_are_ray_s_less_what_the_application_sets() -> None:
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig

    keys = SCHEMA["properties"]["models"]["items"]["properties"].keys()
    assert keys == (LLMConfig.model_fields.keys() - {"server_cls"}) | {"headrace"}
    loading = SCHEMA["properties"]["models"]["items"]["properties"]["model_loading_config"]["properties"].keys()
    assert loading == {"model_id", "model_source", "tokenizer_source"}
