"""A configuration as a file for `serve deploy` and KubeRay, split so that a change of live settings restarts nothing.

Serve rebuilds an application, and restarts all of it, when its `args` change; it applies what stands under
`deployments` without a rebuild. So numbers of replicas and live settings go there; `args` keep what needs a restart.
"""

from __future__ import annotations

from typing import Any

from cluster.config import ClusterConfig
from cluster.live import ingress_user_config, live_settings
from cluster.replica_bounds import with_policy
from cluster.settings import INGRESS_OUTLASTS_S, SCHEDULER, ModelSettings

INGRESS = "HeadraceIngress"
_SCALE = ("num_replicas", "autoscaling_config")


def deployment_name(model_id: str) -> str:
    """The name of a model's deployment. Source: `ray.llm`'s server builder."""
    return f"HeadraceServer:{model_id.replace('/', '--').replace('.', '_')}"


def serve_file(config: ClusterConfig) -> dict[str, Any]:
    """The file's content, JSON-like; `ray` is left out, since the cluster is there already."""
    application = config.application
    args = application.args
    models, deployments = [], []
    for entry in args.llm_configs:
        settings = args.settings_of(entry.model_id)
        own = entry.own
        options = dict(own.get("deployment_config", {}))
        scale = _scale(options)
        if scale.get("autoscaling_config"):
            scale["autoscaling_config"] = with_policy(scale["autoscaling_config"], entry, settings)
        models.append(own | {"deployment_config": options, "headrace": _of_the_engine(settings)})
        deployments.append({
            "name": deployment_name(entry.model_id), **scale,
            "graceful_shutdown_timeout_s": settings.drain_s, "user_config": live_settings(settings),
        })
    ingress = dict(args.ingress_deployment_config)
    stops_in_s = ingress.pop("graceful_shutdown_timeout_s", args.drain_s + INGRESS_OUTLASTS_S)
    scale = _scale(ingress) | {"graceful_shutdown_timeout_s": stops_in_s}
    rest: dict[str, Any] = {"ingress_deployment_config": ingress} if ingress else {}
    if args.headrace.tracing.otlp_endpoint is not None:
        rest["headrace"] = {"tracing": args.headrace.tracing.model_dump()}
    return {
        "proxy_location": config.proxy_location,
        "http_options": config.http_options.model_dump(),
        **({"logging_config": logs} if (logs := config.logging_config.model_dump(exclude_unset=True)) else {}),
        "applications": [{
            "name": application.name, "import_path": application.import_path,
            "route_prefix": application.route_prefix, "runtime_env": application.runtime_env,
            "args": {"llm_configs": models, **rest},
            "deployments": [{"name": INGRESS, **scale, "user_config": ingress_user_config(args)}, *deployments],
        }],
    }


def _scale(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of scale out of a deployment's.

    Ray builds a deployment without a number of replicas as one that Serve scales between 1 and 1, and Serve goes on
    scaling it beside a number in the file; so the file also says that nothing scales. "auto" stays where it is: Serve
    would put it together with those bounds.
    """
    if options.get("num_replicas") == "auto":
        return {}
    scale = {key: options.pop(key) for key in _SCALE if key in options}
    return scale | ({"autoscaling_config": None} if scale.get("num_replicas") is not None else {})


def _of_the_engine(settings: ModelSettings) -> dict[str, Any]:
    """The settings that an engine starts with: a file must name the profile, though another one restarts nothing."""
    other = {} if settings.scheduler == SCHEDULER else {"scheduler": settings.scheduler}
    profile = settings.controller.profile
    return ({"controller": {"profile": profile}} if profile else {}) | other
