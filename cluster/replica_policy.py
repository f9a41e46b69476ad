"""The number of replicas for Ray Serve's autoscaler: what our controller wants. Runs in Serve's own controller.

    autoscaling_config: {…, policy: {policy_function: "cluster.replica_policy:WantedReplicasPolicy"}}

Ray's documented extension point, a policy class; KubeRay's and Ray's autoscalers of nodes follow what comes out. The
controller leaves its number in the cluster's store (`cluster/scaling.py`); a thread here reads it, so that Serve's loop
never waits. While nothing new has come for a while, as when the controller is gone, Ray's own rule may add replicas, by
requests under way, and none is taken away. Nothing here raises an error: Serve would then scale nothing at all.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.serve.autoscaling_policy import default_autoscaling_policy
from ray.serve.config import AutoscalingContext

from replicas.store import wanted_key
from scheduler.tuning.kept_replicas import kept_replicas

_READ_EVERY_S = 1.0
_SILENT = "the controller has said nothing lately"
logger = logging.getLogger("ray.serve")


@dataclass(slots=True)
class _Board:
    """What the thread has read. changed_s: by this process' own clock, when it last was something new. Of what is there
    at the first look nobody knows how old it is."""

    value: dict[str, Any] | None = None
    changed_s: float = -math.inf

    def read(self, value: Any, now_s: float) -> None:
        if not isinstance(value, dict):
            return
        if self.value is not None and value.get("look") != self.value.get("look"):
            self.changed_s = now_s
        self.value = value

    def fresh(self, now_s: float) -> dict[str, Any] | None:
        value = self.value
        if value is None or now_s - self.changed_s > float(value.get("valid_for_s", 0.0)):
            return None
        return value


class WantedReplicasPolicy:
    """One deployment's policy. read: what the controller has left; the store of the context's application, if None."""

    def __init__(
        self, read: Callable[[str, str], Any] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read, self._clock = read or _from_store, clock
        self._board, self._stop = _Board(), threading.Event()
        self._thread: threading.Thread | None = None
        self._said: tuple[str, int] | None = None
        self._failed = ""

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number for Serve, which keeps it within min_replicas and max_replicas."""
        try:
            self._keep_reading(str(context.app_name), str(context.deployment_name))
            told = self._board.fresh(self._clock())
            if told is not None and told.get("decided", True):
                slots = float(context.config.get_target_ongoing_requests())
                kept = kept_replicas(float(context.total_num_requests), slots, context.target_num_replicas)
                number = max(int(told["replicas"]), kept)
                self._say(context, "the controller", number, str(told.get("reason", "")))
                return number, {}
            desired = default_autoscaling_policy(context)[0]
            number = max(math.ceil(desired), context.target_num_replicas)
            why = _SILENT if told is None else str(told.get("reason", ""))
            self._say(context, "Ray's own rule, and none is taken away", number, why)
            return number, {}
        except Exception as error:
            if repr(error) != self._failed:  # Serve asks ten times a second
                logger.exception("no number of replicas for %s: as many as there are", context.deployment_name)
            self._failed = repr(error)
            return context.target_num_replicas, {}

    def _keep_reading(self, app_name: str, deployment: str) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        args = (self._read, app_name, deployment, self._board, self._stop, self._clock)
        self._thread = threading.Thread(target=_keep_reading, args=args, name="headrace-wanted-replicas", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._stop.set)  # Serve makes a new policy with every deployment

    def _say(self, context: AutoscalingContext, who: str, number: int, why: str) -> None:
        """Into Serve's log, when the number changes or who decides it."""
        if (who, number) != self._said:
            now = context.target_num_replicas
            logger.info("%s, %d replicas now: %d by %s: %s", context.deployment_name, now, number, who, why)
        self._said = who, number


def _keep_reading(
    read: Callable[[str, str], Any], app_name: str, deployment: str, board: _Board, stop: threading.Event,
    clock: Callable[[], float],
) -> None:
    said = ""
    while True:
        try:
            board.read(read(app_name, deployment), clock())
            said = ""
        except Exception as error:  # Ray's store is away, or this process lacks our packages
            if repr(error) != said:
                logger.warning("cannot read how many replicas %s should have: %r", deployment, error)
            said = repr(error)
        if stop.wait(_READ_EVERY_S):
            return


def _from_store(app_name: str, deployment: str) -> Any:
    from replicas.cluster_store import ClusterStore

    return ClusterStore(app_name).get(wanted_key(deployment))
