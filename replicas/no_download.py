"""Starting a replica whose model is a folder: nothing to download.

Ray Serve LLM starts a task on every node of a replica to fetch the model, which imports vLLM first and is on the way of
the start. The fence around that non-public hook: `tests/replicas/test_ray_seam.py` fails when an upgrade moves it.
"""

from __future__ import annotations

from ray.llm._internal.common.callbacks.base import CallbackBase


class NoDownload(CallbackBase):
    """Skips Ray Serve LLM's download task; for models in a local folder."""

    async def on_before_node_init(self) -> None:
        """Ray Serve LLM asks this first."""
        self.ctx.run_init_node = False
