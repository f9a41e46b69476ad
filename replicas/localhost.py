"""Keeping a local Ray's Serve replicas off the network.

Every Serve replica opens a gRPC port for other deployments on all interfaces, whatever the node's own address is. Where
that address is 127.0.0.1, nothing beyond this machine can be meant. The fence around that one non-public name of Ray
Serve: `tests/replicas/test_ray_seam.py` fails when an upgrade moves it.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private import replica as serve_replica

LOCALHOST = "127.0.0.1"
ALL_INTERFACES = "[::]:"


def listen_where_the_node_does() -> None:
    """On a node whose address is 127.0.0.1, bind this process's Serve ports to it; call before Serve opens them."""
    if ray.util.get_node_ip_address() != LOCALHOST:
        return
    bind = serve_replica.add_port_to_grpc_server

    def bind_locally(server: Any, address: str) -> Any:
        return bind(server, address.replace(ALL_INTERFACES, f"{LOCALHOST}:"))

    serve_replica.add_port_to_grpc_server = bind_locally
