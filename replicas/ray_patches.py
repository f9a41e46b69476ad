"""Patches of Ray: a local Ray's Serve replicas stay off the network, a model in a folder is not downloaded, LoRA
adapters may lie in a folder, and a replica hears that Serve begins to stop it.

The fence around non-public names of Ray: `tests/replicas/test_ray_seam.py` fails when an upgrade moves any.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
from pyarrow import fs as arrow_fs
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.common.utils.cloud_filesystem.pyarrow_filesystem import PyArrowFileSystem
from ray.llm._internal.serve.utils.lora_serve_utils import LoraModelLoader
from ray.serve._private import replica as serve_replica

LOCALHOST = "127.0.0.1"
ALL_INTERFACES = "[::]:"
ADAPTER_FOLDER = "pyarrow-file://"
"""The beginning of a folder's address that Ray's configuration takes; users write file://."""
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


def take_adapters_from_folders() -> None:
    """Let this process read LoRA adapters from `pyarrow-file:///FOLDER`; in replicas and ingresses.

    Ray lists and loads adapters from buckets only, although the library under it reads folders as well.
    """
    find = PyArrowFileSystem.get_fs_and_path

    def find_also_folders(object_uri: str) -> tuple[arrow_fs.FileSystem, str]:
        if not object_uri.startswith(ADAPTER_FOLDER):
            return find(object_uri)  # type: ignore[no-any-return]
        return arrow_fs.LocalFileSystem(), object_uri.removeprefix(ADAPTER_FOLDER)

    PyArrowFileSystem.get_fs_and_path = staticmethod(find_also_folders)


def adapter_loader(folder: Path) -> Callable[..., LoraModelLoader]:
    """Ray's loader of LoRA adapters, with its copies in a replica's own folder.

    Ray's own place is one per machine, by the adapter's name: there a replica could load an adapter of another model,
    or one that another replica is just writing.
    """
    return partial(LoraModelLoader, str(folder / "adapters"))


class NoDownload(CallbackBase):
    """Skips Ray Serve LLM's download task; for models in a local folder.

    The task runs on every node before a replica starts, and imports vLLM.
    """

    async def on_before_node_init(self) -> None:
        """Called by Ray Serve LLM before a node is prepared."""
        self.ctx.run_init_node = False
