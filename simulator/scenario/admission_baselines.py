"""Admission rules of other projects, at their documented defaults: they reject a request when it arrives.

The engines behind them are plain vLLM. Their statistics are always current here, which favours them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scheduler.model.iteration_time import IterationTimeModel


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """State of a replica when a request arrives: waiting requests, prompt tokens of requests without a first token,
    share of KV blocks in use, the iteration-time model, and the TTFT target in seconds."""

    waiting: int
    prefill_tokens: int
    kv_used_fraction: float
    time_model: IterationTimeModel
    ttft_s: float | None


AdmissionRule = Callable[[ReplicaLoad], bool]


def queued_tokens(load: ReplicaLoad) -> bool:
    """vLLM's max_num_queued_tokens, set as documented: target TTFT times prefill throughput (needs a TTFT target)."""
    token_s = load.time_model.added_s(prefill_tokens=1.0)
    return load.ttft_s is None or token_s == 0 or load.prefill_tokens < load.ttft_s / token_s


def llm_d_utilisation(load: ReplicaLoad) -> bool:
    """llm-d's saturation detector: open below a queue depth of 5 and a KV use of 0.8."""
    return load.waiting < 5 and load.kv_used_fraction < 0.8


def dynamo_busy(load: ReplicaLoad) -> bool:
    """Dynamo's busy thresholds: open up to 0.85 of decode blocks and 10 000 prefill tokens."""
    return load.kv_used_fraction <= 0.85 and load.prefill_tokens <= 10_000
