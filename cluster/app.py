"""The Serve application: ingress, routers and replicas put together from an `AppConfig`.

    serve run headrace:build …            serve deploy configs/local.yaml        headrace up

Follows `ray.serve.llm.build_openai_app`, with Headrace's ingress, its endpoints and its request router in the places
that Ray leaves open for them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import ray
from ray import serve
from ray.llm._internal.common.dict_utils import maybe_apply_llm_deployment_config_defaults
from ray.llm._internal.serve.constants import DEFAULT_MAX_TARGET_ONGOING_REQUESTS
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.core.ingress.ingress import DEFAULT_ENDPOINTS, init
from ray.llm._internal.serve.core.server.builder import build_llm_deployment
from ray.serve import Application
from ray.serve.llm import LLMConfig
from ray.serve.llm.ingress import make_fastapi_ingress

from cluster.config import AppConfig
from cluster.controller import ControllerKeeper, TunedModel
from cluster.llm_entry import LLMEntry
from cluster.settings import ModelSettings
from replicas.ranks import ServedModel
from replicas.ray_patches import NoDownload
from replicas.server import HeadraceServer
from router.auth import Keyring, guard
from router.errors import speak_openai
from router.ingress import ADMIN_ENDPOINTS, HEALTH_ENDPOINTS, HeadraceIngress
from router.request_router import FluidSlackRouter
from scheduler.settings import SETTINGS_KEY
from scheduler.support import EngineSetup, ranks_in
from scheduler.thresholds import thresholds_as_dict

_ROUTING_STATS_PERIOD_S = 1.0
_HEALTH_CHECK_TIMEOUT_S = 60.0  # a busy replica must not count as dead
_MAX_ONGOING_REQUESTS = 1024
_FEWEST_INGRESSES = 2  # with more than one node: the loss of either leaves one


def build(args: AppConfig) -> Application:
    """The application for `args` (Serve validates the YAML's `args` against `AppConfig`)."""
    args = AppConfig.model_validate(args)
    configs = {entry.model_id: llm_config(entry, args.settings_of(entry.model_id)) for entry in args.llm_configs}
    deployments = {model_id: build_llm_deployment(config) for model_id, config in configs.items()}
    models = {
        _deployment_name(deployments[model_id]): ServedModel(model_id, ranks_in(config.engine_kwargs))
        for model_id, config in configs.items()
    }
    if len(models) < len(configs):
        raise ValueError(f"two models share a deployment's name: {', '.join(configs)}; rename one of them")
    tuned = {name: TunedModel(model, args.settings_of(model.model_id)) for name, model in models.items()}
    keys = Keyring(args.headrace.tenants)
    ingress = make_fastapi_ingress(
        HeadraceIngress,
        endpoint_map={
            **HEALTH_ENDPOINTS, **guard(ADMIN_ENDPOINTS, keys.require_operator),
            **guard(DEFAULT_ENDPOINTS, keys.require_user),
        },
        app=speak_openai(init()),
    )
    return serve.deployment(ingress, **ingress_options(list(configs.values()), args.ingress_deployment_config)).bind(
        llm_deployments=deployments,
        model_cards={model_id: to_model_metadata(model_id, config) for model_id, config in configs.items()},
        lora_paths={
            model_id: config.lora_config.dynamic_lora_loading_path
            for model_id, config in configs.items() if config.lora_config is not None
        },
        keeper=ControllerKeeper(tuned) if any(one.settings.controller.enabled for one in tuned.values()) else None,
        models=models,
    )


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
    ours = {
        "thresholds": thresholds_as_dict(settings.thresholds), "profile": settings.controller.profile,
        "targets": asdict(settings.targets), "overflow_probability": settings.controller.overflow_probability,
        "trust_tenants": True,  # requests reach a replica through our ingress only, which signs each of them
    }
    arguments: dict[str, Any] = {"scheduler_cls": settings.scheduler, "additional_config": {SETTINGS_KEY: ours}}
    # vLLM decides for each drafter whether it can be scheduled ahead, and raises an error if this is set.
    if not EngineSetup.from_engine_args(entry.engine_kwargs, settings.targets).speculative_decoding:
        arguments["async_scheduling"] = True
    return arguments


def _deployment_config(entry: LLMEntry, settings: ModelSettings) -> dict[str, Any]:
    """The entry's deployment options over our defaults."""
    router = {
        "request_router_class": FluidSlackRouter, "request_routing_stats_period_s": _ROUTING_STATS_PERIOD_S,
    }
    defaults = {"max_ongoing_requests": _MAX_ONGOING_REQUESTS, "health_check_timeout_s": _HEALTH_CHECK_TIMEOUT_S}
    return defaults | entry.deployment_config | {
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
    nodes = _nodes()
    if nodes > 1:
        defaults["autoscaling_config"] = {
            "min_replicas": _FEWEST_INGRESSES, "max_replicas": max(_FEWEST_INGRESSES, nodes),
            "target_ongoing_requests": DEFAULT_MAX_TARGET_ONGOING_REQUESTS, **defaults["autoscaling_config"],
        }
    elif "autoscaling_config" not in given:
        defaults |= {"autoscaling_config": None, "num_replicas": 1}
    options: dict[str, Any] = maybe_apply_llm_deployment_config_defaults(defaults, given)
    return options


def _nodes() -> int:
    """Nodes of the cluster that are alive; 1 where there is none yet."""
    return sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1


def _deployment_name(application: Application) -> str:
    return str(application._bound_deployment.name)
