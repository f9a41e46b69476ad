"""The built application carries what Ray Serve LLM's own builder would, and ours where Ray leaves a place."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("vllm", reason="vLLM is not installed")

OURS = {
    "request_router_config", "graceful_shutdown_timeout_s", "health_check_period_s", "health_check_timeout_s",
    "max_ongoing_requests", "max_surge_percent", "user_config", "version",
}
"""Options of a deployment for which we have defaults of our own."""
RAYS_OWN = {"policy_function": "ray.serve.autoscaling_policy:default_autoscaling_policy"}
ENTRIES: dict[str, dict[str, Any]] = {
    "plain": {"deployment_config": {"num_replicas": 3}},
    "cpu": {"accelerator_config": {"kind": "cpu"}, "deployment_config": {"ray_actor_options": {"num_cpus": 2}}},
    "tensor parallel": {"accelerator_type": "A100", "engine_kwargs": {"tensor_parallel_size": 2}},
    "tensor and pipeline parallel": {"engine_kwargs": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}},
    "autoscaled": {
        "deployment_config": {
            "autoscaling_config": {
                "min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 32, "policy": RAYS_OWN,
            },
            "max_queued_requests": 10,
        }
    },
    "autoscaled to zero": {
        "deployment_config": {"autoscaling_config": {"min_replicas": 0, "max_replicas": 2, "policy": RAYS_OWN}},
    },
    "autoscaled by Serve": {"deployment_config": {"num_replicas": "auto"}},
    "placement": {
        "engine_kwargs": {"tensor_parallel_size": 2},
        "placement_group_config": {"bundle_per_worker": {"CPU": 1, "GPU": 1}, "strategy": "SPREAD"},
    },
    "bundles": {"placement_group_config": {"bundles": [{"CPU": 2, "GPU": 0.5}]}},
    "environment": {"runtime_env": {"env_vars": {"A": "b"}}},
    "adapters": {
        "engine_kwargs": {"enable_lora": True},
        "lora_config": {"dynamic_lora_loading_path": "s3://bucket/adapters", "max_num_adapters_per_replica": 4},
    },
    "other router": {
        "deployment_config": {
            "request_router_config": {
                "request_router_class": "ray.serve.llm.request_router:PrefixCacheAffinityRouter",
                "request_routing_stats_period_s": 3.0,
            }
        }
    },
}


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The builders ask for the runtime environment of the driver, which would start a Ray."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env={}))


def entry_of(name: str, model_id: str = "org/m.1") -> dict[str, Any]:
    return {"model_loading_config": {"model_id": model_id, "model_source": "org/m"}, **copy.deepcopy(ENTRIES[name])}


def built(*entries: dict[str, Any], headrace: dict[str, Any] | None = None, **args: Any) -> Any:
    from cluster.app import build
    from cluster.config import AppConfig

    headrace = {"controller": {"profile": "cpu-smollm2"}} | (headrace or {})
    return build(AppConfig.model_validate({"llm_configs": list(entries), "headrace": headrace, **args}))


def built_by_ray(*entries: dict[str, Any]) -> Any:
    from ray.serve.llm import build_openai_app

    return build_openai_app({"llm_configs": [copy.deepcopy(entry) for entry in entries]})


def model_in(application: Any, model_id: str = "org/m.1") -> Any:
    return application._bound_deployment.init_kwargs["llm_deployments"][model_id]._bound_deployment


def options_of(deployment: Any) -> dict[str, Any]:
    """What Serve would be told about a deployment, less the names and ours."""
    config = deployment._deployment_config.model_dump()
    replica = deployment._replica_config
    placed = {
        name: getattr(replica, name)
        for name in ("ray_actor_options", "placement_group_bundles", "placement_group_strategy")
    }
    shared = config.keys() - OURS - {"user_configured_option_names"}
    return {name: config[name] for name in shared} | placed


@pytest.mark.parametrize("name", ENTRIES)
def test_a_deployment_has_the_options_that_ray_would_give_it(name: str) -> None:
    ours, theirs = model_in(built(entry_of(name))), model_in(built_by_ray(entry_of(name)))
    assert options_of(ours) == options_of(theirs)
    assert ours.name.removeprefix("HeadraceServer:") == theirs.name.removeprefix("LLMServer:") == "org--m_1"


@pytest.mark.parametrize("name", ENTRIES)
def test_an_engine_gets_what_ray_would_give_it_and_our_scheduler(name: str) -> None:
    ours = model_in(built(entry_of(name))).init_kwargs["llm_config"]
    theirs = model_in(built_by_ray(entry_of(name))).init_kwargs["llm_config"]
    differ = {key for key in type(ours).model_fields if getattr(ours, key) != getattr(theirs, key)}
    assert differ == {"server_cls", "engine_kwargs", "deployment_config"}
    added = ours.engine_kwargs.keys() - theirs.engine_kwargs.keys()
    assert added == {"scheduler_cls", "additional_config", "async_scheduling"}
    assert {key: value for key, value in ours.engine_kwargs.items() if key not in added} == theirs.engine_kwargs


def test_bounds_without_a_policy_get_the_controllers_decision() -> None:
    entry = entry_of("plain") | {"deployment_config": {"autoscaling_config": {"min_replicas": 0, "max_replicas": 3}}}
    scaling = model_in(built(entry))._deployment_config.autoscaling_config
    assert scaling.policy.policy_function == "cluster.replica_policy:WantedReplicasPolicy"
    assert (scaling.min_replicas, scaling.max_replicas) == (0, 3)
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (0, 0)


def test_adapters_and_cards_reach_the_ingress_as_ray_s() -> None:
    entries = entry_of("adapters"), entry_of("cpu", "other")
    ours, theirs = (app._bound_deployment.init_kwargs for app in (built(*entries), built_by_ray(*entries)))
    assert ours["lora_paths"] == theirs["lora_paths"] == {"org/m.1": "s3://bucket/adapters"}
    assert [card.id for card in ours["model_cards"].values()] == ["org/m.1", "other"]
    assert {card.id: card.metadata for card in ours["model_cards"].values()} == {
        card.id: card.metadata for card in theirs["model_cards"].values()
    }
    assert ours["models"] == {"HeadraceServer:org--m_1": ("org/m.1", 1), "HeadraceServer:other": ("other", 1)}


def test_our_own_defaults_hold_unless_the_entry_says_otherwise() -> None:
    config = model_in(built(entry_of("plain"), headrace={"drain_s": 33.0}))._deployment_config
    assert (config.graceful_shutdown_timeout_s, config.health_check_timeout_s, config.max_ongoing_requests) == (
        33.0, 60.0, 1024,
    )
    assert config.request_router_config.request_router_class == "router.request_router.FluidRouter"
    entry = entry_of("plain") | {"deployment_config": {"max_ongoing_requests": 5, "health_check_timeout_s": 7.0}}
    config = model_in(built(entry))._deployment_config
    assert (config.health_check_timeout_s, config.max_ongoing_requests) == (7.0, 5)
    router = model_in(built(entry_of("other router")))._deployment_config.request_router_config
    assert router.request_routing_stats_period_s == 3.0
    assert router.request_router_class.endswith("PrefixCacheAffinityRouter")


def test_each_model_s_engine_and_controller_have_its_own_settings() -> None:
    other = entry_of("cpu", "other") | {
        "headrace": {"targets": {"ttft_s": 9.0}, "scheduler": "mine.Scheduler", "drain_s": 5.0},
        "engine_kwargs": {"data_parallel_size": 2},
    }
    app = built(entry_of("plain"), other, headrace={"targets": {"ttft_s": 3.0}})
    engines = {name: model_in(app, name).init_kwargs["llm_config"].engine_kwargs for name in ("org/m.1", "other")}
    settings = {name: engine["additional_config"]["headrace"] for name, engine in engines.items()}
    assert {name: one["targets"]["ttft_s"] for name, one in settings.items()} == {"org/m.1": 3.0, "other": 9.0}
    assert engines["other"]["scheduler_cls"] == "mine.Scheduler"
    assert model_in(app, "other")._deployment_config.graceful_shutdown_timeout_s == 5.0
    kwargs = app._bound_deployment.init_kwargs
    assert kwargs["models"]["HeadraceServer:other"].ranks == 2
    tuned = kwargs["keeper"].models
    assert {name: one.settings.targets.ttft_s for name, one in tuned.items()} == {
        "HeadraceServer:org--m_1": 3.0, "HeadraceServer:other": 9.0,
    }


def test_without_any_controller_there_is_no_keeper() -> None:
    off = {"controller": {"enabled": False, "profile": "cpu-smollm2"}}
    assert built(entry_of("plain"), headrace=off)._bound_deployment.init_kwargs["keeper"] is None
    one_on = entry_of("cpu", "other") | {"headrace": {"controller": {"enabled": True}}}
    assert built(entry_of("plain"), one_on, headrace=off)._bound_deployment.init_kwargs["keeper"] is not None


def test_names_that_become_one_deployment_are_rejected() -> None:
    with pytest.raises(ValueError, match="two models share a deployment's name"):
        built(entry_of("plain", "a/b"), entry_of("plain", "a--b"))


@pytest.mark.parametrize(
    ("nodes", "given", "replicas", "bounds"),
    [
        (1, {}, 1, None), (2, {}, None, (2, 2)), (5, {}, None, (2, 5)),
        (1, {"num_replicas": 3}, 3, None), (5, {"num_replicas": 1}, 1, None),
        (1, {"autoscaling_config": {"min_replicas": 2, "max_replicas": 4}}, None, (2, 4)),
        (5, {"autoscaling_config": {"max_replicas": 8}}, None, (2, 8)),
    ],
)
def test_ingresses_are_as_many_as_configured_or_by_nodes(
    monkeypatch: pytest.MonkeyPatch, nodes: int, given: dict[str, Any], replicas: int | None,
    bounds: tuple[int, int] | None,
) -> None:
    from cluster import app as application

    monkeypatch.setattr(application, "_nodes", lambda: nodes)
    built_app = built(entry_of("plain"), entry_of("cpu", "other"), ingress_deployment_config=given)
    config = built_app._bound_deployment._deployment_config
    assert config.max_ongoing_requests == 4 * 2 * 1024
    if bounds is None:
        assert (config.num_replicas, config.autoscaling_config) == (replicas, None)
    else:
        assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == bounds


def test_ray_s_builder_merges_options_as_ours() -> None:
    from ray.llm._internal.common.dict_utils import maybe_apply_llm_deployment_config_defaults as merged

    assert merged({"autoscaling_config": {"max_replicas": 2}, "name": "n"}, {"num_replicas": 3}) == {
        "name": "n", "num_replicas": 3,
    }


def test_the_ingress_scales_to_zero_only_with_its_models_and_beside_others() -> None:
    """As Ray's: on a cluster of several nodes, so that the last of a scaled-down group can go."""
    from cluster import app as application

    def fewest(*entries: dict[str, Any]) -> int:
        configs = [model_in(built(*entries), one["model_loading_config"]["model_id"]).init_kwargs["llm_config"]
                   for one in entries]
        options = application.ingress_options(configs, {"autoscaling_config": {"max_replicas": 3}})
        return int(options["autoscaling_config"].get("min_replicas", 1))

    zero, more = entry_of("autoscaled to zero"), entry_of("autoscaled", "more")
    assert fewest(zero) == 0
    assert fewest(zero, more) == 1
