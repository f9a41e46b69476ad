"""The bounds within which Ray Serve changes a model's replicas, with our policy in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.llm_entry import LLMEntry
from cluster.settings import ModelSettings

POLICY = "cluster.replica_policy:WantedReplicasPolicy"
_USUAL_SLOTS = 256
"""Requests that vLLM runs at once where nothing says how many."""


def with_policy(scaling: Any, entry: LLMEntry, settings: ModelSettings) -> Any:
    """An entry's autoscaling_config with our policy, unless it names one, or nothing decides a number (another policy
    than `fluid`, no controller).

    The decision waits by itself before it takes replicas away, so Ray's delays are 0. target_ongoing_requests is of
    Ray's own rule, which holds while the controller is silent: an engine's slots.
    """
    decides = settings.controller.enabled and settings.thresholds.policy == "fluid"
    if not isinstance(scaling, Mapping) or "policy" in scaling or not decides:
        return scaling
    slots = entry.engine_kwargs.get("max_num_seqs") or _USUAL_SLOTS
    ours = {
        "target_ongoing_requests": slots, "upscale_delay_s": 0.0, "downscale_delay_s": 0.0,
        "policy": {"policy_function": POLICY},
    }
    return ours | dict(scaling)
