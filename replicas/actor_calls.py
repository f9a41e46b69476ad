"""Calling a method on one particular replica, or on all of them, from outside Serve's load balancing.

Serve picks the replica of a handle's call; control needs a given one. Ray Serve LLM's own control
endpoints do this through the replica actors (`ray.llm._internal.serve.utils.broadcast`), and so does this module, the
fence around that non-public surface: `tests/replicas/test_ray_seam.py` fails when an upgrade moves it.
"""

from __future__ import annotations

import asyncio
import pickle
import uuid
from typing import Any

import ray
from ray.serve._private.common import RequestMetadata
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve.request_router import ReplicaID

SERVER_CLASS = "HeadraceServer"
"""Ray Serve LLM names a deployment by its server class and its model: HeadraceServer:MODEL."""
INGRESS_CLASS = "HeadraceIngress"

_owed_answers: dict[str, Any] = {}
"""By replica actor: a call that timed out and is still unanswered."""


class ReplicaUnavailable(RuntimeError):
    """A replica did not answer: it is starting, overloaded or gone."""


def replica_ids(app_name: str) -> dict[str, str]:
    """The live replicas of an application's model servers: actor name by replica id, in a stable order.

    Forgets the pending calls of replicas that are gone. Blocks on the cluster, so not on an event loop.
    """
    return _replicas(app_name, f"{SERVER_CLASS}:")


def ingress_ids(app_name: str) -> dict[str, str]:
    """The live replicas of an application's ingress, as `replica_ids`."""
    return _replicas(app_name, INGRESS_CLASS)


def _replicas(app_name: str, deployments: str) -> dict[str, str]:
    found: dict[str, str] = {}
    actors = ray.util.list_named_actors(all_namespaces=True)
    for gone in set(_owed_answers) - {actor["name"] for actor in actors}:
        _owed_answers.pop(gone, None)
    for actor in actors:
        name = actor["name"]
        if actor["namespace"] != SERVE_NAMESPACE or not ReplicaID.is_full_id_str(name):
            continue
        replica = ReplicaID.from_full_id_str(name)
        deployment = replica.deployment_id
        if deployment.app_name == app_name and deployment.name.startswith(deployments):
            found[replica.unique_id] = name
    return dict(sorted(found.items()))


def replicas_of(app_name: str, deployment: str) -> int:
    """The number of live replicas of any deployment, such as the ingress. Blocks on the cluster."""
    names = [
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == SERVE_NAMESPACE and ReplicaID.is_full_id_str(actor["name"])
    ]
    found = [ReplicaID.from_full_id_str(name).deployment_id for name in names]
    return sum((one.app_name, one.name) == (app_name, deployment) for one in found)


def deployment_of(actor_name: str) -> str:
    """The deployment to which a replica belongs, by its actor's name: HeadraceServer:MODEL."""
    return str(ReplicaID.from_full_id_str(actor_name).deployment_id.name)


async def call_replica(actor_name: str, method: str, *, timeout_s: float = 5.0, **kwargs: Any) -> Any:
    """The result of `method(**kwargs)` on one replica.

    A replica with an unanswered earlier call is not called again: calls to a starting replica would pile up.

    Raises:
        ReplicaUnavailable: no answer within `timeout_s`, or the replica is gone.
    """
    owed = _owed_answers.get(actor_name)
    if owed is not None and not ray.wait([owed], timeout=0)[0]:
        raise ReplicaUnavailable(f"replica {actor_name} is starting or busy: an earlier call is still unanswered")
    _owed_answers.pop(actor_name, None)
    request_id = f"headrace-{uuid.uuid4()}"
    metadata = RequestMetadata(request_id=request_id, internal_request_id=request_id, call_method=method)
    try:
        actor = ray.get_actor(actor_name, namespace=SERVE_NAMESPACE)
        reference = actor.handle_request.remote(pickle.dumps(metadata), **kwargs)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(reference.future()), timeout_s)
        except TimeoutError:
            _owed_answers[actor_name] = reference
            raise
    except (ValueError, TimeoutError, ray.exceptions.RayError) as error:
        raise ReplicaUnavailable(f"replica {actor_name} did not answer {method}: {error!r}") from error
