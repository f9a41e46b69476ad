"""The Serve application: ingress, router and replicas put together from an `AppConfig`.

    serve run headrace:build …            serve deploy configs/local.yaml        headrace up

Follows `ray.serve.llm.build_openai_app`, with Headrace's ingress, its endpoints and its request router in the places
that Ray leaves open for them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.core.ingress.ingress import DEFAULT_ENDPOINTS, init
from ray.llm._internal.serve.core.server.builder import build_llm_deployment
from ray.serve import Application
from ray.serve.llm import LLMConfig
from ray.serve.llm.ingress import make_fastapi_ingress

from cluster.config import AppConfig, ModelConfig
from cluster.controller import ControllerKeeper
from replicas.draining import DRAIN_S
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
_INGRESS_OUTLASTS_S = 15.0
_HEALTH_CHECK_TIMEOUT_S = 60.0  # a busy replica must not count as dead


def build(args: AppConfig) -> Application:
    """The application for `args` (Serve validates the YAML's `args` against `AppConfig`)."""
    config = llm_config(args)
    model_id = args.model.id
    options: dict[str, Any] = HeadraceIngress.get_deployment_options([config])
    # One ingress process: it only forwards bytes; each further one costs memory and a control connection.
    options |= {"autoscaling_config": None, "num_replicas": 1, "max_ongoing_requests": 4 * args.max_ongoing_requests}
    options["graceful_shutdown_timeout_s"] = DRAIN_S + _INGRESS_OUTLASTS_S  # it streams what the replicas finish
    ranks = ranks_in(args.engine)
    keeper = None
    if args.controller.enabled:
        keeper = ControllerKeeper(args.controller, args.targets, args.thresholds, ranks)
    keys = Keyring(args.tenants)
    ingress = make_fastapi_ingress(
        HeadraceIngress,
        endpoint_map={
            **HEALTH_ENDPOINTS, **guard(ADMIN_ENDPOINTS, keys.require_operator),
            **guard(DEFAULT_ENDPOINTS, keys.require_user),
        },
        app=speak_openai(init()),
    )
    return serve.deployment(ingress, **options).bind(
        llm_deployments={model_id: build_llm_deployment(config)},
        model_cards={model_id: to_model_metadata(model_id, config)},
        lora_paths={},
        keeper=keeper,
        ranks=ranks,
    )


def llm_config(args: AppConfig) -> LLMConfig:
    """Ray Serve LLM's description of the replicas: our server, our scheduler, our request router."""
    settings = {
        "thresholds": thresholds_as_dict(args.thresholds), "profile": args.controller.profile,
        "targets": asdict(args.targets), "overflow_probability": args.controller.overflow_probability,
        "trust_tenants": True,  # requests reach a replica through our ingress only, which signs each of them
    }
    accelerator = args.accelerator
    setup = EngineSetup.from_engine_args(args.engine, args.targets)
    return LLMConfig(
        model_loading_config={"model_id": args.model.id, "model_source": _source(args.model)},
        accelerator_config={"kind": accelerator.kind},
        accelerator_type=accelerator.type,
        server_cls=HeadraceServer,
        engine_kwargs={
            **args.engine,
            "scheduler_cls": args.scheduler,
            # vLLM decides for each drafter whether it can be scheduled ahead, and raises an error if this is set.
            **({} if setup.speculative_decoding else {"async_scheduling": True}),
            "additional_config": {SETTINGS_KEY: settings},
        },
        deployment_config={
            "num_replicas": args.replicas,
            "max_ongoing_requests": args.max_ongoing_requests,
            "health_check_timeout_s": _HEALTH_CHECK_TIMEOUT_S,
            "graceful_shutdown_timeout_s": DRAIN_S,
            "ray_actor_options": {"num_cpus": accelerator.cpus},
            "request_router_config": {
                "request_router_class": FluidSlackRouter,
                "request_routing_stats_period_s": _ROUTING_STATS_PERIOD_S,
            },
        },
        runtime_env={"env_vars": args.env} if args.env else None,
        **({"callback_config": {"callback_class": NoDownload}} if args.model.local_folder else {}),
        log_engine_metrics=False,
    )


def _source(model: ModelConfig) -> str:
    # A replica's working directory is not the one the path was written for.
    return str(model.local_folder.resolve()) if model.local_folder else model.source
