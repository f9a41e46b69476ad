"""Which engines serve an application, and which model each."""

from __future__ import annotations

from collections.abc import Mapping

from replicas.actor_calls import deployment_of, replica_ids
from replicas.ranks import EngineAddress, ServedModel, engines_in


def engines_of(app_name: str, models: Mapping[str, ServedModel]) -> dict[str, EngineAddress]:
    """The engines of an application's live replicas by name; `models` by deployment.

    Replicas of other deployments, such as those a redeploy is about to end, are left out. Blocks on the cluster, so not
    on an event loop.
    """
    found: dict[str, EngineAddress] = {}
    for replica, actor_name in replica_ids(app_name).items():
        deployment = deployment_of(actor_name)
        if deployment in models:
            found |= engines_in(replica, actor_name, deployment, models[deployment])
    return found
