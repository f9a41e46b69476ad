"""What the Helm chart renders is a configuration that the application accepts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import Chart

from cluster import config as config_module
from cluster.config import AppConfig, ClusterConfig
from scheduler.tuning.slo import Slo

CHART = Path(__file__).resolve().parents[2] / "helm" / "headrace"
ENGINE_ARGUMENTS = ["max_model_len", "max_num_seqs", "gpu_memory_utilization", "dtype", "enforce_eager"]


@pytest.fixture(scope="module")
def chart() -> Iterator[Chart]:
    with Chart.load(CHART) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def _known_engine_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "_engine_argument_names", lambda: ENGINE_ARGUMENTS)


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
        {"gpu": {"type": ""}},
        {"policy": {"name": "fcfs", "maxHoldSeconds": 0}},
        {"policy": {"name": "wait", "maxHoldSeconds": 60}},
        {"targets": {"ttftSeconds": 3, "tpotSeconds": 0.08}},
        {"targets": {"latencySeconds": 20.5}},
        {"tenants": [{"name": "a", "weight": 3, "secretName": "s", "secretKey": "k"},
                     {"name": "b", "secretName": "s", "secretKey": "l"}]},
        {"replicas": 1024},
        {"controller": {"enabled": False, "periodSeconds": 3600, "profile": "a100-llama2-7b-paper"}},
        {"controller": {"periodSeconds": 0.001}},
        {"service": {"port": 65535}},
        {"engine": {"maxModelLen": 1048576, "maxNumSeqs": 1, "extraArgs": {"enforce_eager": True}}},
    ],
    ids=str,
)
def test_whatever_the_chart_accepts_the_application_accepts(chart: Chart, values: dict[str, Any] | None) -> None:
    rendered = serve_config(chart, values)
    config = ClusterConfig.model_validate(rendered)
    args = AppConfig.model_validate(rendered["applications"][0]["args"])
    assert config.application.args == args
    assert config.http_options.host == "0.0.0.0"
    assert args.accelerator.kind == "gpu"
    if values and "policy" in values:
        assert args.thresholds.policy == values["policy"]["name"]
        assert args.thresholds.max_hold_s == values["policy"]["maxHoldSeconds"]


def test_the_chart_s_default_is_the_shipped_gpu_configuration(chart: Chart) -> None:
    shipped = yaml.safe_load((CHART.parents[1] / "configs" / "a100.yaml").read_text())["applications"][0]["args"]
    args = AppConfig.model_validate(serve_config(chart, None)["applications"][0]["args"])
    assert args.model.model_dump() == shipped["model"]
    assert args.accelerator.type == shipped["accelerator"]["type"]
    assert args.controller.profile == shipped["controller"]["profile"]
    assert args.thresholds.policy == "fluid"


def test_every_key_of_the_chart_is_a_key_of_the_application(chart: Chart) -> None:
    args = serve_config(chart, None)["applications"][0]["args"]
    assert args.keys() <= AppConfig.model_fields.keys()
    targets = {"ttftSeconds": 3, "tpotSeconds": 0.08, "latencySeconds": 9}
    args = serve_config(chart, {"targets": targets})["applications"][0]["args"]
    assert AppConfig.model_validate(args).targets == Slo(3, 0.08, 9)
    for key in ("model", "accelerator", "controller"):
        assert args[key].keys() <= AppConfig.model_fields[key].annotation.model_fields.keys()  # type: ignore[union-attr]
