"""Environment variables that Ray and Ray Serve LLM read when they are imported; set before that."""

from __future__ import annotations

import os
from collections.abc import Mapping

from cluster import haproxy


def prepare(*, local: bool, with_haproxy: bool = False) -> None:
    """For this process and those it starts. local: Ray is started on this machine, for this application alone.
    with_haproxy: its Serve takes HTTP in through HAProxy."""
    if local:
        # Ray's own switch for machines that are no cluster (its default on macOS and Windows): all of its services then
        # listen on 127.0.0.1.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        if with_haproxy:
            use(haproxy.environment())
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    # A hook that only sets up logging, and makes every idle Ray worker import vLLM for it.
    os.environ.setdefault("RAYLLM_ENABLE_WORKER_PROCESS_SETUP_HOOK", "0")


def use(variables: Mapping[str, str]) -> None:
    """Set these environment variables, as far as the user has not set them."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)
