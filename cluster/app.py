"""The Serve application: ingress, routers and replicas put together from an `AppConfig`.

    serve run headrace:build …            serve deploy configs/local.yaml        headrace up

Follows `ray.serve.llm.build_openai_app`, with Headrace's ingress, its endpoints and its request router in the places
that Ray leaves open for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.llm._internal.common.dict_utils import maybe_apply_llm_deployment_config_defaults
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.core.ingress.ingress import DEFAULT_ENDPOINTS
from ray.llm._internal.serve.core.server.builder import build_llm_deployment
from ray.serve import Application
from ray.serve.llm import LLMConfig
from ray.serve.llm.ingress import make_fastapi_ingress

from cluster.config import AppConfig
from cluster.keeper import ControllerKeeper
from cluster.keys import with_keys
from cluster.live import SettingsJudge, ingress_user_config, live_settings
from cluster.llm_entry import LLMEntry
from cluster.replica_bounds import with_policy
from cluster.rollout import surge_percent, version_of
from cluster.settings import INGRESS_OUTLASTS_S, ModelSettings
from cluster.tuned import TunedModel
from replicas.live_settings import engine_settings
from replicas.ranks import ServedModel
from replicas.ray_patches import NoDownload
from replicas.server import HeadraceServer
from replicas.tracing import OTLP_ENDPOINT
from router.http_app import http_app
from router.ingress import ADMIN_ENDPOINTS, HEALTH_ENDPOINTS, HeadraceIngress, desk_of_this_ingress
from router.request_router import FluidRouter
from scheduler.settings import SETTINGS_KEY
from scheduler.support import EngineSetup, ranks_in

_ROUTING_STATS_PERIOD_S = 1.0
_HEALTH_CHECK_PERIOD_S = 1.0  # Serve learns from its checks that a replica's process has ended
_HEALTH_CHECK_TIMEOUT_S = 60.0  # a busy replica must not count as dead
_MAX_ONGOING_REQUESTS = 1024
_SCALE = ("num_replicas", "autoscaling_config", "max_ongoing_requests")
"""Options of a deployment that Serve changes without a restart."""
_FEWEST_INGRESSES = 2  # with more than one node: the loss of either leaves one


def build(args: AppConfig) -> Application:
    """The application for `args` (Serve validates the YAML's `args` against `AppConfig`)."""
    return application(args)


def application(args: AppConfig, runtime_env: Mapping[str, Any] | None = None) -> Application:
    """The application, each of whose deployments restarts only when something changes that its processes start with.

    runtime_env: of the application; a change of it restarts everything.
    """
    args = AppConfig.model_validate(args)
    environment = dict(runtime_env or {})
    tracing = args.headrace.tracing
    entries = [_traced(entry, tracing.otlp_endpoint) for entry in args.llm_configs]
    configs = {entry.model_id: llm_config(entry, args.settings_of(entry.model_id)) for entry in entries}
    deployments = {
        entry.model_id: _followed(
            build_llm_deployment(configs[entry.model_id]),
            version_of(_started_with(entry, args.settings_of(entry.model_id)), environment),
            live_settings(args.settings_of(entry.model_id)),
        )
        for entry in entries
    }
    models = {
        _deployment_name(deployments[model_id]): ServedModel(model_id, ranks_in(config.engine_kwargs))
        for model_id, config in configs.items()
    }
    if len(models) < len(configs):
        raise ValueError(f"two models share a deployment's name: {', '.join(configs)}; rename one of them")
    tuned = {name: TunedModel(model, args.settings_of(model.model_id)) for name, model in models.items()}
    ingress = make_fastapi_ingress(
        HeadraceIngress, endpoint_map={**HEALTH_ENDPOINTS, **ADMIN_ENDPOINTS, **DEFAULT_ENDPOINTS},
        app=http_app(desk_of_this_ingress),
    )
    lora_paths = {
        model_id: config.lora_config.dynamic_lora_loading_path
        for model_id, config in configs.items() if config.lora_config is not None
    }
    is_tuned = any(one.settings.controller.enabled for one in tuned.values())
    given = {key: value for key, value in args.ingress_deployment_config.items() if key not in _SCALE}
    options = with_keys(
        ingress_options(list(configs.values()), args.ingress_deployment_config), args.headrace.tenants
    )
    bound = serve.deployment(ingress, **options).bind(
        llm_deployments=deployments,
        model_cards={model_id: to_model_metadata(model_id, config) for model_id, config in configs.items()},
        lora_paths=lora_paths,
        keeper=ControllerKeeper(tuned) if is_tuned else None,
        models=models, tracing=tracing.model_dump(),
        judge=SettingsJudge({entry.model_id: entry.engine_kwargs for entry in args.llm_configs}, is_tuned),
    )
    return _followed(
        bound, version_of(models, lora_paths, is_tuned, given, tracing.model_dump(), environment),
        ingress_user_config(args),
    )


def versions_of(built: Application) -> dict[str, str]:
    """The versions of an application's deployments: of each model's engine, by the model's name, and of the ingress,
    by ""."""
    ingress = built._bound_deployment
    engines = ingress._replica_config.init_kwargs["llm_deployments"]
    return {"": ingress._version} | {name: engine._bound_deployment._version for name, engine in engines.items()}


def _followed(built: Application, version: str, user_config: dict[str, Any]) -> Application:
    """The same, under a version that changes with what needs a restart, and with live settings."""
    deployment = built._bound_deployment
    replica = deployment._replica_config
    options = {"num_cpus": 1, **(replica.ray_actor_options or {})}
    bundles = replica.placement_group_bundles or [_resources(options)]
    surge = deployment._deployment_config.max_surge_percent or surge_percent(bundles)
    followed = deployment.options(
        version=version, user_config=user_config, max_surge_percent=surge, _internal=True,
    )
    return Application(followed)


def _resources(actor_options: Mapping[str, Any]) -> dict[str, float]:
    """Ray's resources by name, from the options of an actor."""
    named = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    amounts = {name: actor_options[option] for option, name in named.items() if actor_options.get(option)}
    return amounts | (actor_options.get("resources") or {})


def _started_with(entry: LLMEntry, settings: ModelSettings) -> dict[str, Any]:
    """What a replica of a model starts with; Serve itself looks at its resources, and scale needs no restart."""
    return {
        "entry": {key: value for key, value in entry.own.items() if key != "deployment_config"},
        "engine": {
            key: value for key, value in _engine_arguments(entry, settings).items() if key != "additional_config"
        },
    }


def _traced(entry: LLMEntry, endpoint: str | None) -> LLMEntry:
    """The entry with vLLM's spans going to the same collector, unless it names one itself."""
    if endpoint is None:
        return entry
    return entry.model_copy(update={"engine_kwargs": {OTLP_ENDPOINT: endpoint, **entry.engine_kwargs}})


def llm_config(entry: LLMEntry, settings: ModelSettings) -> LLMConfig:
    """Ray Serve LLM's description of a model's replicas, with our server, our scheduler and our request router."""
    own = entry.own
    if entry.local_folder:
        # A replica's working directory is not the one the path was written for.
        own["model_loading_config"] |= {"model_source": str(entry.local_folder.resolve())}
        own.setdefault("callback_config", {"callback_class": NoDownload})
    return LLMConfig.model_validate(
        own | {
            "server_cls": HeadraceServer,
            "engine_kwargs": entry.engine_kwargs | _engine_arguments(entry, settings),
            "deployment_config": _deployment_config(entry, settings),
        }
    )


def _engine_arguments(entry: LLMEntry, settings: ModelSettings) -> dict[str, Any]:
    """What we set of vLLM's engine arguments."""
    # Requests reach a replica through our ingress only, which signs each of them.
    ours = engine_settings(live_settings(settings)).as_dict() | {"trust_tenants": True}
    arguments: dict[str, Any] = {"scheduler_cls": settings.scheduler, "additional_config": {SETTINGS_KEY: ours}}
    # vLLM decides for each drafter whether it can be scheduled ahead, and raises an error if this is set.
    if not EngineSetup.from_engine_args(entry.engine_kwargs, settings.targets).speculative_decoding:
        arguments["async_scheduling"] = True
    return arguments


def _deployment_config(entry: LLMEntry, settings: ModelSettings) -> dict[str, Any]:
    """The entry's deployment options over our defaults."""
    router = {
        "request_router_class": FluidRouter, "request_routing_stats_period_s": _ROUTING_STATS_PERIOD_S,
    }
    defaults = {
        "max_ongoing_requests": _MAX_ONGOING_REQUESTS, "health_check_period_s": _HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": _HEALTH_CHECK_TIMEOUT_S,
    }
    scaled = entry.deployment_config.get("autoscaling_config")
    own = {"autoscaling_config": with_policy(scaled, entry, settings)} if scaled else {}
    return defaults | entry.deployment_config | own | {
        "request_router_config": router | entry.deployment_config.get("request_router_config", {}),
        "graceful_shutdown_timeout_s": settings.drain_s,
    }


def ingress_options(configs: list[LLMConfig], given: dict[str, Any]) -> dict[str, Any]:
    """Deployment options of the ingress: the given ones over the defaults.

    By default one replica on a cluster of one node, as an ingress only forwards bytes; on more nodes Serve scales it,
    from two up.
    """
    defaults: dict[str, Any] = HeadraceIngress.get_deployment_options(configs)
    defaults["max_ongoing_requests"] = 4 * sum(config.deployment_config["max_ongoing_requests"] for config in configs)
    drain_s = max(config.deployment_config["graceful_shutdown_timeout_s"] for config in configs)
    defaults["graceful_shutdown_timeout_s"] = drain_s + INGRESS_OUTLASTS_S
    nodes = _nodes()
    if nodes > 1:
        bounds = {"min_replicas": _FEWEST_INGRESSES, "max_replicas": max(_FEWEST_INGRESSES, nodes)}
        defaults["autoscaling_config"] = bounds | defaults["autoscaling_config"]
    elif "autoscaling_config" not in given:
        defaults |= {"autoscaling_config": None, "num_replicas": 1}
    options: dict[str, Any] = maybe_apply_llm_deployment_config_defaults(defaults, given)
    return options


def _nodes() -> int:
    """Nodes of the cluster that are alive; 1 where there is none yet."""
    return sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1


def _deployment_name(application: Application) -> str:
    return str(application._bound_deployment.name)
