"""The rows of a run: requests, iterations and control cycles, with the Parquet schema of each."""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

COMPLETED = "completed"
REJECTED = "rejected"
GAVE_UP = "gave_up"
UNFINISHED = "unfinished"

_NAME = pa.dictionary(pa.int32(), pa.string())

REQUEST_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("replica", pa.int16(), nullable=False),
        pa.field("type", _NAME, nullable=False),
        pa.field("arrival_s", pa.float64(), nullable=False),
        pa.field("first_token_s", pa.float64()),
        pa.field("finished_s", pa.float64()),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("output_tokens", pa.int32(), nullable=False),
        pa.field("preemptions", pa.int16(), nullable=False),
        pa.field("outcome", _NAME, nullable=False),
        pa.field("rejected_s", pa.float64()),
        pa.field("cached_tokens", pa.int32()),
        pa.field("attempts", pa.int16()),
        pa.field("returned_s", pa.float64()),
    ]
)

ITERATION_SCHEMA = pa.schema(
    [
        pa.field("replica", pa.int16(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("prefill_tokens", pa.int32(), nullable=False),
        pa.field("decode_tokens", pa.int32(), nullable=False),
        pa.field("kv_read_tokens", pa.int64(), nullable=False),
        pa.field("kv_used_tokens", pa.int64(), nullable=False),
        pa.field("batch_size", pa.int32(), nullable=False),
        pa.field("running", pa.int32(), nullable=False),
        pa.field("waiting", pa.int32(), nullable=False),
        pa.field("held", pa.int32(), nullable=False),
        pa.field("sitting_out", pa.int32(), nullable=False),
        pa.field("max_running", pa.int32()),
        pa.field("token_budget", pa.int32()),
    ]
)

CONTROL_SCHEMA = pa.schema(
    [
        pa.field("replica", pa.int16(), nullable=False),
        pa.field("at_s", pa.float64(), nullable=False),
        pa.field("applied", pa.bool_(), nullable=False),
        pa.field("version", pa.int32(), nullable=False),
        pa.field("rate_rps", pa.float64(), nullable=False),
        pa.field("max_running", pa.int32()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("iteration_s", pa.float64()),
        pa.field("full_iteration_s", pa.float64()),
        pa.field("prompt_flow_tokens", pa.float64()),
        pa.field("mean_output_tokens", pa.float64()),
        pa.field("kv_limit_tokens", pa.int64()),
        pa.field("queue_limit", pa.int64()),
    ]
)


class RequestRow(NamedTuple):
    """One request. Times are virtual seconds; `index` counts arrivals; `preemptions` counts losses of its KV cache.

    `outcome` is "completed", "rejected" for a request rejected before any token (both later times are then None),
    "gave_up" when its client left without a token, or "unfinished" when it was under way at the end of the run.
    `rejected_s` is when its client got the rejection; `cached_tokens` the prompt tokens that vLLM found in the prefix
    cache when it first ran (None: it never ran). A request that is retried after a rejection has several `attempts`;
    its row describes the last one, which began at `returned_s` (None: the first one, at `arrival_s`). In measurements
    of a real server the last four are None.
    """

    index: int  # type: ignore[assignment]  # hides tuple's method of that name, which is not used
    replica: int
    type: str
    arrival_s: float
    first_token_s: float | None
    finished_s: float | None
    prompt_tokens: int
    output_tokens: int
    preemptions: int
    outcome: str
    rejected_s: float | None = None
    cached_tokens: int | None = None
    attempts: int = 1
    returned_s: float | None = None


class IterationRow(NamedTuple):
    """One engine iteration: tokens computed and read, requests, and the active thresholds (None: no limit)."""

    replica: int
    start_s: float
    seconds: float
    prefill_tokens: int
    decode_tokens: int
    kv_read_tokens: int
    kv_used_tokens: int
    batch_size: int
    running: int
    waiting: int
    held: int
    sitting_out: int
    max_running: int | None
    token_budget: int | None


class ControlRow(NamedTuple):
    """One control cycle over a replica: the thresholds active after it, and the reason.

    applied: this cycle pushed them, as `version`. rate_rps: the estimated arrival rate. From the fluid parameters (None
    without): iteration_s, prompt_flow_tokens, kv_limit_tokens and queue_limit (see
    `scheduler.fluid_params.FluidParams`); full_iteration_s: modelled seconds of an iteration with that flow, 100
    decodes and all of that memory; mean_output_tokens: of the survival curve.
    """

    replica: int
    at_s: float
    applied: bool
    version: int
    rate_rps: float
    max_running: int | None
    reason: str
    iteration_s: float | None = None
    full_iteration_s: float | None = None
    prompt_flow_tokens: float | None = None
    mean_output_tokens: float | None = None
    kv_limit_tokens: int | None = None
    queue_limit: int | None = None
