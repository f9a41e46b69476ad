"""Patches of Ray: a local Ray's Serve replicas stay off the network, a model in a folder is not downloaded, and a
replica hears that Serve begins to stop it.

The fence around the non-public names of Ray: `tests/replicas/test_ray_seam.py` fails when an upgrade moves either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import ray
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.serve._private import replica as serve_replica

LOCALHOST = "127.0.0.1"
ALL_INTERFACES = "[::]:"
logger = logging.getLogger(__name__)


def listen_where_the_node_does() -> None:
    """On a node with address 127.0.0.1, bind this process's Serve ports to it; call before Serve opens them.

    Every Serve replica opens a gRPC port for other deployments on all interfaces, whatever the node's own address is.
    """
    if ray.util.get_node_ip_address() != LOCALHOST:
        return
    bind = serve_replica.add_port_to_grpc_server

    def bind_locally(server: Any, address: str) -> Any:
        return bind(server, address.replace(ALL_INTERFACES, f"{LOCALHOST}:"))

    serve_replica.add_port_to_grpc_server = bind_locally


def on_graceful_shutdown(hook: Callable[[float], object]) -> None:
    """Call `hook` when Serve begins to stop this process's replica, with the seconds until Serve kills it.

    Serve tells a replica only when its requests have ended. The hook runs in the thread of Serve's own event loop.
    """
    perform = serve_replica.Replica.perform_graceful_shutdown

    async def performing(replica: Any) -> None:
        try:
            hook(replica._deployment_config.graceful_shutdown_timeout_s)
        except Exception:  # whatever happens here, the replica stops
            logger.exception("the replica could not begin to drain")
        await perform(replica)

    serve_replica.Replica.perform_graceful_shutdown = performing


class NoDownload(CallbackBase):
    """Skips Ray Serve LLM's download task; for models in a local folder.

    The task runs on every node before a replica starts, and imports vLLM.
    """

    async def on_before_node_init(self) -> None:
        """Called by Ray Serve LLM before a node is prepared."""
        self.ctx.run_init_node = False
