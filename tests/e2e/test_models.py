"""Two models behind one endpoint, one of them with two LoRA adapters, on real engines."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from cluster_process import CHECKOUT, MODEL, ClusterProcess
from lora_adapters import RANK, write_adapter

from cluster.model import prepare_bundled_model

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]
TUNED, PLAIN = "smollm2-135m", "second"
ADAPTERS = [f"{TUNED}:north", f"{TUNED}:south"]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    """The same checkpoint under two names, one replica each."""
    prepare_bundled_model(MODEL)
    folder = tmp_path_factory.mktemp("models")
    adapters = folder / "adapters"
    for seed, adapter in enumerate(ADAPTERS):
        write_adapter(adapters / adapter.partition(":")[2], MODEL, seed=seed)
    (entry,) = yaml.safe_load((CHECKOUT / "configs" / "local.yaml").read_text())["applications"][0]["args"][
        "llm_configs"
    ]
    entry["model_loading_config"]["model_source"] = str(MODEL)
    entry["deployment_config"] = {"num_replicas": 1}
    entry["engine_kwargs"] |= {"max_model_len": 512, "max_num_batched_tokens": 512}
    tuned, plain = entry, copy.deepcopy(entry)
    tuned["engine_kwargs"] |= {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}
    tuned["lora_config"] = {"dynamic_lora_loading_path": f"file://{adapters}", "max_num_adapters_per_replica": 2}
    plain["model_loading_config"]["model_id"] = PLAIN
    plain["headrace"] = {"targets": {"ttft_s": 60.0}, "thresholds": {"max_running": 7}}
    process = ClusterProcess(
        folder, llm_configs=[tuned, plain],
        headrace={"targets": {"ttft_s": 30.0, "tpot_s": 5.0}, "controller": {"period_s": 1.0}},
    )
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.stop()


def answer(cluster: ClusterProcess, model: str) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    response = cluster.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == model
    return str(response.json()["choices"][0]["text"])


def by_model(cluster: ClusterProcess) -> dict[str, Any]:
    return {replica["model"]: replica for replica in cluster.state()["replicas"].values()}


def test_both_models_and_the_adapters_are_listed(cluster: ClusterProcess) -> None:
    listed = [model["id"] for model in cluster.http.get("/v1/models").json()["data"]]
    assert sorted(listed) == sorted([TUNED, PLAIN, *ADAPTERS])
    assert cluster.http.get(f"/v1/models/{ADAPTERS[0]}").json()["id"] == ADAPTERS[0]


def test_requests_go_to_the_model_they_name(cluster: ClusterProcess) -> None:
    before = {model: replica["counters"]["completed"] for model, replica in by_model(cluster).items()}
    answers = {answer(cluster, model) for model in (TUNED, PLAIN, PLAIN)}
    assert len(answers) == 1, "the checkpoint is the same"
    done = {model: replica["counters"]["completed"] - before[model] for model, replica in by_model(cluster).items()}
    assert done == {TUNED: 1, PLAIN: 2}
    unknown = cluster.http.post("/v1/completions", json={"model": "third", "prompt": PROMPT, "max_tokens": 1})
    assert unknown.status_code == 404
    unnamed = cluster.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1})
    assert unnamed.status_code == 400, "which of the two is meant"


def test_each_engine_has_its_own_model_s_settings(cluster: ClusterProcess) -> None:
    replicas = by_model(cluster)
    assert replicas[TUNED]["targets"] == {"ttft_s": 30.0, "tpot_s": 5.0, "latency_s": None}
    assert replicas[PLAIN]["targets"] == {"ttft_s": 60.0, "tpot_s": 5.0, "latency_s": None}
    assert [replicas[model]["thresholds"]["max_running"] for model in (TUNED, PLAIN)] == [None, 7]
    fluid = {model: replica["thresholds"]["fluid"] for model, replica in replicas.items()}
    assert [fluid[model]["ttft_s"] for model in (TUNED, PLAIN)] == [30.0, 60.0], "what the engines themselves plan by"


def test_adapters_answer_each_in_its_own_way_under_fluid(cluster: ClusterProcess) -> None:
    answers = {model: answer(cluster, model) for model in (TUNED, *ADAPTERS)}
    assert len(set(answers.values())) == 3
    assert {model: answer(cluster, model) for model in (*ADAPTERS, TUNED)} == answers, "each again"
    assert by_model(cluster)[TUNED]["thresholds"]["policy"] == "fluid"
    missing = cluster.http.post("/v1/completions", json={"model": f"{TUNED}:west", "prompt": "x", "max_tokens": 1})
    assert missing.status_code == 404
    assert missing.json()["error"]["message"] == f"Could not find model with id '{TUNED}:west'."
    assert cluster.http.get(f"/v1/models/{TUNED}:west").status_code == 404
