"""What restarts replicas and what does not: versions of deployments, the file for Serve, and what `up` says of it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from fake_store import FakeStore

from cluster import rollout
from cluster.config import AppConfig, ClusterConfig
from cluster.deployed import NOTHING, deployed, note, opens, whats_new
from cluster.live import live_settings
from cluster.serve_file import INGRESS, deployment_name, serve_file
from replicas.live_settings import kept_change, store_key

pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("vllm", reason="vLLM is not installed")

VERSIONS = {"": "i", "a": "1", "b": "2"}


def arguments(**changes: Any) -> dict[str, Any]:
    entries = [
        {
            "model_loading_config": {"model_id": name, "model_source": "org/model"},
            "accelerator_config": {"kind": "cpu"}, "deployment_config": {"num_replicas": 2},
            "engine_kwargs": {"max_num_seqs": 64},
        }
        for name in "ab"
    ]
    headrace = {"controller": {"profile": "a100-llama2-7b-paper"}, "targets": {"tpot_s": 0.5}}
    return {"llm_configs": entries, "headrace": headrace} | changes


def args(**changes: Any) -> AppConfig:
    return AppConfig.model_validate(arguments(**changes))


def with_entry(**changes: Any) -> dict[str, Any]:
    """The arguments with changes of model a's entry."""
    given = arguments()
    given["llm_configs"][0] = given["llm_configs"][0] | changes
    return given


@pytest.fixture(scope="module")
def versions() -> Any:
    from cluster.app import application, versions_of

    def of(given: dict[str, Any], runtime_env: dict[str, Any] | None = None) -> dict[str, str]:
        return versions_of(application(AppConfig.model_validate(given), runtime_env))

    return of


@pytest.mark.parametrize(
    "change",
    [
        {"headrace": {"controller": {"profile": "a100-llama2-7b-paper"}, "targets": {"tpot_s": 0.1}}},
        {"headrace": {"controller": {"profile": "a100-llama2-7b", "period_s": 1.0}, "drain_s": 5.0}},
        {"headrace": {
            "controller": {"profile": "a100-llama2-7b-paper"}, "thresholds": {"policy": "fcfs"},
            "tenants": [{"name": "t", "api_key_env": "T"}],
        }},
        {"llm_configs": with_entry(deployment_config={"num_replicas": 7})["llm_configs"]},
        {"llm_configs": with_entry(
            deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 3}}
        )["llm_configs"]},
        {"ingress_deployment_config": {"num_replicas": 3, "autoscaling_config": None}},
    ],
    ids=["targets", "controller", "tenants-and-policy", "replicas", "autoscaling", "ingresses"],
)
def test_live_settings_and_scale_are_in_no_version(versions: Any, change: dict[str, Any]) -> None:
    assert versions(arguments(**change)) == versions(arguments())


def test_another_engine_concerns_its_own_model_alone(versions: Any) -> None:
    before, after = versions(arguments()), versions(with_entry(engine_kwargs={"max_num_seqs": 32}))
    assert before["a"] != after["a"] and (before["b"], before[""]) == (after["b"], after[""])
    own = versions(with_entry(headrace={"scheduler": "my.Scheduler"}))
    assert own["a"] not in (before["a"], after["a"]) and own["b"] == before["b"]


def test_another_environment_or_release_concerns_all(versions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = versions(arguments())
    after = versions(arguments(), {"env_vars": {"A": "1"}})
    assert all(before[name] != after[name] for name in before)
    monkeypatch.setattr(rollout, "_code", lambda: "another release")
    assert all(before[name] != version for name, version in versions(arguments()).items())


def test_replicas_start_before_others_stop_only_where_a_node_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout.ray, "is_initialized", lambda: True)
    nodes = {"n": {"CPU": 4.0, "GPU": 1.0}, "m": {"CPU": 2.0}}
    monkeypatch.setattr(rollout, "available_resources_per_node", lambda: nodes)
    assert rollout.surge_percent([{"CPU": 1}, {"GPU": 1}]) == rollout.SURGE_PERCENT
    assert rollout.surge_percent([{"GPU": 1}, {"GPU": 1}]) == 0
    assert rollout.surge_percent([{"CPU": 5}]) == 0, "no single node has it"


def test_the_file_for_serve_keeps_live_settings_and_scale_out_of_args(versions: Any) -> None:
    def file(**headrace: Any) -> dict[str, Any]:
        general = arguments()["headrace"] | headrace
        config = ClusterConfig.model_validate({"applications": [{"args": arguments(headrace=general)}]})
        return yaml.safe_load(yaml.safe_dump(serve_file(config)))["applications"][0]  # type: ignore[no-any-return]

    first, second = file(), file(targets={"tpot_s": 0.1}, tenants=[{"name": "t", "api_key_env": "T"}])
    assert first["args"] == second["args"], "Serve rebuilds nothing"
    told = {one["name"]: one for one in second["deployments"]}
    assert told[deployment_name("a")]["num_replicas"] == 2
    assert told[deployment_name("a")]["user_config"]["targets"] == {"tpot_s": 0.1}
    assert told[INGRESS]["user_config"]["tenants"] == [{"name": "t", "api_key_env": "T"}]
    assert versions(first["args"]) == versions(arguments()), "the same processes as from the file itself"


@pytest.mark.parametrize(("scale", "number", "most"), [
    ({"num_replicas": 3}, 3, None),
    ({"autoscaling_config": {"min_replicas": 1, "max_replicas": 5}}, None, 5),
    ({"num_replicas": "auto"}, None, 100),
])
def test_serve_runs_the_number_of_replicas_that_the_file_says(
    scale: dict[str, Any], number: int | None, most: int | None
) -> None:
    """Serve puts what stands under `deployments` over what `build` returns for the file's `args`."""
    from ray.serve._private.application_state import override_deployment_info
    from ray.serve._private.deployment_info import DeploymentInfo
    from ray.serve.schema import ServeApplicationSchema

    from cluster.app import application

    given = with_entry(deployment_config=scale)
    file = serve_file(ClusterConfig.model_validate({"applications": [{"args": given}]}))["applications"][0]
    ingress = application(AppConfig.model_validate(file["args"]))._bound_deployment
    engines = ingress._replica_config.init_kwargs["llm_deployments"].values()
    built = [ingress, *(engine._bound_deployment for engine in engines)]
    infos = {
        one.name: DeploymentInfo(one._deployment_config, one._replica_config, start_time_ms=0, deployer_job_id="")
        for one in built
    }
    config = override_deployment_info(infos, ServeApplicationSchema.model_validate(file))[deployment_name("a")]
    scaling = config.deployment_config.autoscaling_config
    assert (scaling and scaling.max_replicas) == most
    assert number is None or config.deployment_config.num_replicas == number


def test_the_file_names_the_deployments_as_the_application_does() -> None:
    from cluster.app import application

    given = arguments()
    given["llm_configs"][0]["model_loading_config"]["model_id"] = "org/model-1.5"
    built = application(AppConfig.model_validate(given))
    ingress = built._bound_deployment
    names = {one._bound_deployment.name for one in ingress._replica_config.init_kwargs["llm_deployments"].values()}
    assert ingress.name == INGRESS and names == {deployment_name("org/model-1.5"), deployment_name("b")}


def test_a_deployment_is_told_by_what_it_changes() -> None:
    store = FakeStore()
    first = deployed(args(), VERSIONS)
    assert whats_new(store, first) == []
    note(store, first)
    assert whats_new(store, first) == [NOTHING]
    other = with_entry(
        deployment_config={"num_replicas": 1}, headrace={"targets": {"tpot_s": 0.1}}, engine_kwargs={},
    )
    new = deployed(AppConfig.model_validate(other), VERSIONS | {"a": "3"})
    assert whats_new(store, new) == [
        "a: another engine, its replicas are replaced one by one", "a: replicas 2 -> 1", "a: targets.tpot_s 0.5 -> 0.1",
    ]


def test_what_an_operator_changed_since_is_told_and_undone() -> None:
    store = FakeStore()
    first = deployed(args(), VERSIONS)
    note(store, first)
    present = live_settings(args().settings_of("a"))
    store.put(store_key("a"), kept_change(present, present | {"targets": {"tpot_s": 0.2}}))
    assert whats_new(store, first) == ["a: targets.tpot_s 0.2 -> 0.5"]
    note(store, first)
    assert store.get(store_key("a")) is None and whats_new(store, first) == [NOTHING]


def test_other_api_keys_are_told_and_the_last_one_does_not_vanish_unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FakeStore()
    monkeypatch.setenv("HEADRACE_API_KEY", "first")
    with_key = deployed(args(), VERSIONS)
    assert not opens(store, with_key)
    note(store, with_key)
    assert "first" not in str(with_key), "only digests are kept"
    monkeypatch.setenv("HEADRACE_API_KEY", "second")
    other = deployed(args(), VERSIONS)
    assert whats_new(store, other) == ["HEADRACE_API_KEY: another API key", "the ingress is replaced"]
    assert not opens(store, other)
    monkeypatch.delenv("HEADRACE_API_KEY")
    without = deployed(args(), VERSIONS)
    assert whats_new(store, without) == ["HEADRACE_API_KEY: no API key any more", "the ingress is replaced"]
    assert opens(store, without), "up refuses it unless told --insecure"
    note(store, without)
    assert not opens(store, without)


def test_an_ingress_outlasts_the_longest_drain_of_its_replicas(versions: Any) -> None:
    def file(**more: Any) -> dict[str, Any]:
        given = arguments(headrace=arguments()["headrace"] | {"drain_s": 3600}, **more)
        config = ClusterConfig.model_validate({"applications": [{"args": given}]})
        return serve_file(config)["applications"][0]  # type: ignore[no-any-return]

    def stops_in_s(file: dict[str, Any]) -> float:
        (ingress,) = (one for one in file["deployments"] if one["name"] == INGRESS)
        return float(ingress["graceful_shutdown_timeout_s"])

    assert stops_in_s(file()) == 3615
    own = file(ingress_deployment_config={"graceful_shutdown_timeout_s": 40})
    assert stops_in_s(own) == 40 and "graceful_shutdown_timeout_s" not in str(own["args"])
