"""vLLM's client of the engine cores, as `replicas.engine_health` watches it, and the processes under it.

The fence around the non-public names of vLLM that this takes: `tests/replicas/test_engine_seam.py` fails when an
upgrade moves any of them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from typing import Any

import psutil

from scheduler.engine.channel import remove_endpoint

_TRACKER = "resource_tracker"


class EngineClient:
    """A `replicas.engine_health.WatchedEngine` over vLLM's AsyncLLM."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._outputs = 0
        processor = client.output_processor
        process_outputs = processor.process_outputs

        @functools.wraps(process_outputs)
        def counting(*args: Any, **kwargs: Any) -> Any:
            self._outputs += 1
            return process_outputs(*args, **kwargs)

        processor.process_outputs = counting

    def is_dead(self) -> bool:
        """Whether vLLM has seen an engine core or a worker of one end."""
        return bool(self._client.errored)

    def requests(self, rank: int) -> int:
        """Requests handed to a rank's engine core and not finished; those that are still tokenised do not count."""
        unfinished = self._client.output_processor.request_states
        ranks = getattr(self._client.engine_core, "reqs_in_flight", None)
        if ranks is None:  # one engine core
            return len(unfinished)
        own = self._client.engine_core.core_engines[rank]
        return sum(engine == own and request in unfinished for request, engine in ranks.items())

    def outputs(self) -> int:
        """How often engine cores have sent outputs of requests."""
        return self._outputs

    async def loop_answers(self) -> None:
        """Return when the loops of the engine cores have answered a question that costs nothing."""
        await self._client.is_sleeping()

    def kill(self) -> None:
        """End all engine processes."""
        kill_children()


def kill_children() -> None:
    """SIGKILL, which ends stopped processes too, to all processes that this one has started.

    Python's tracker of shared memory is left: it removes what the killed ones leave, and ends with this process.
    """
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not any(_TRACKER in part for part in child.cmdline()):
                child.kill()


def end_process(endpoint: str) -> None:
    """End this replica's process with everything under it; Serve's controller sees the actor die and replaces it.

    A failing health check would be seen as soon, but counts only the third time in a row.
    """
    kill_children()
    remove_endpoint(endpoint)
    logging.shutdown()
    os._exit(1)
