"""A measurement in the simulator's columns and measures, with a client's own columns beside them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loadgen.client import CANCELLED, FAILED, TIMED_OUT, Exchange
from scheduler.tuning.slo import Slo
from simulator.output.metrics import delays_of, meets, request_delays_s, summarise
from simulator.output.rows import COMPLETED, REQUEST_SCHEMA
from simulator.output.run_files import METADATA_KEY, REQUESTS_FILE, versions

SUMMARY_FILE = "summary.json"
SCHEMA = pa.schema(
    [
        *REQUEST_SCHEMA,
        pa.field("asked_output_tokens", pa.int32(), nullable=False),
        pa.field("sent_s", pa.float64()),
        pa.field("good", pa.bool_(), nullable=False),
        pa.field("status", pa.int16()),
        pa.field("retry_after_s", pa.float64()),
        pa.field("message", pa.string()),
        pa.field("token_s", pa.list_(pa.float64()), nullable=False),
    ]
)
_MESSAGES_SHOWN = 5
_LAG_OF_TTFT = 0.05
"""Above this share of the median time to first token, the client's own delay is reported as a warning."""


def is_good(exchange: Exchange, slo: Slo) -> bool:
    """Completed within every target that is given, as `simulator.output.metrics` counts it."""
    if exchange.outcome != COMPLETED:
        return False
    token_s = exchange.token_s
    return bool(meets(delays_of(exchange.asked.arrival_s, token_s[0], token_s[-1], len(token_s)), slo))


def table_of(exchanges: Sequence[Exchange], slo: Slo) -> pa.Table:
    """One row a request, in the order they arrived; REQUEST_SCHEMA's columns first."""
    return pa.Table.from_pylist([_row(exchange, slo) for exchange in exchanges], schema=SCHEMA)


def _row(exchange: Exchange, slo: Slo) -> dict[str, Any]:
    asked, completed = exchange.asked, exchange.outcome == COMPLETED
    return {
        "index": exchange.index, "replica": 0, "type": asked.type_name, "arrival_s": asked.arrival_s,
        "first_token_s": exchange.token_s[0] if exchange.token_s else None,
        "finished_s": exchange.token_s[-1] if completed else None,
        "prompt_tokens": exchange.prompt_tokens or asked.prompt_tokens,
        "output_tokens": len(exchange.token_s) if completed else asked.output_tokens,
        "preemptions": 0, "outcome": exchange.outcome, "asked_output_tokens": asked.output_tokens,
        "sent_s": exchange.sent_s, "good": is_good(exchange, slo), "status": exchange.status,
        "retry_after_s": exchange.retry_after_s, "message": exchange.message, "token_s": exchange.token_s,
    }


def summary_of(requests: pa.Table, slo: Slo, *, warmup: int = 0) -> dict[str, Any]:
    """The simulator's measures over all but the first `warmup` requests, and a client's own; JSON-ready.

    See docs/bench.md for the keys.
    """
    measured = requests.slice(warmup)
    measures = summarise(
        measured, window=(0.0, 1.0), slo_ttft_s=slo.ttft_s, slo_tpot_s=slo.tpot_s, slo_latency_s=slo.latency_s
    )
    outcomes = Counter(measured["outcome"].to_pylist())
    span_s = (measures["window_to_s"] or 0.0) - (measures["window_from_s"] or 0.0)
    lag_s = _numbers(measured, "sent_s") - _numbers(measured, "arrival_s")
    return measures | {
        "failed": outcomes[FAILED], "timed_out": outcomes[TIMED_OUT], "cancelled": outcomes[CANCELLED],
        "good": sum(measured["good"].to_pylist()), "warmup_requests": len(requests) - len(measured),
        "offered_rps": len(measured) / span_s if span_s > 0 else None,
        "ttft_p90_s": _percentile(request_delays_s(measured)["ttft"], 90),
        "retry_after_p50_s": _percentile(_numbers(measured, "retry_after_s"), 50),
        **{f"send_lag_p{q}_s": _percentile(lag_s, q) for q in (50, 99, 100)},
        "messages": dict(Counter(filter(None, measured["message"].to_pylist())).most_common(_MESSAGES_SHOWN)),
    }


def warnings_of(requests: pa.Table, summary: dict[str, Any]) -> list[str]:
    """Warnings about the measurement itself: a late client, wrong output lengths."""
    warnings = []
    lag_s, ttft_s = summary["send_lag_p99_s"], summary["ttft_p50_s"]
    if lag_s is not None and ttft_s is not None and lag_s > _LAG_OF_TTFT * ttft_s:
        warnings.append(
            f"this client was late: 1 % of the requests left more than {lag_s:.3f} s after they were due, which is "
            f"{lag_s / ttft_s:.0%} of the median time to first token; give it a processor of its own or a lower rate"
        )
    completed = requests.filter(np.asarray(requests["outcome"].to_pylist()) == COMPLETED)
    other = int((_numbers(completed, "output_tokens") != _numbers(completed, "asked_output_tokens")).sum())
    if other:
        warnings.append(
            f"{other} outputs have another length than requested; the server ignores ignore_eos or min_tokens"
        )
    return warnings


def write_results(folder: Path, requests: pa.Table, config: dict[str, Any], summary: dict[str, Any]) -> None:
    """summary.json and requests.parquet, which `headrace report` reads like a simulated run's.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    metadata = json.dumps({"config": config, "versions": versions(), "summary": summary}, allow_nan=False)
    partial = folder / f".{REQUESTS_FILE}.partial"
    try:
        pq.write_table(requests.replace_schema_metadata({METADATA_KEY: metadata}), partial, compression="zstd")
        partial.replace(folder / REQUESTS_FILE)
    finally:
        partial.unlink(missing_ok=True)


def _numbers(table: pa.Table, column: str) -> Any:
    """Nulls become NaN."""
    return np.asarray(table[column].to_numpy(), dtype=np.float64)


def _percentile(values: Any, q: float) -> float | None:
    values = values[~np.isnan(values)]
    return float(np.percentile(values, q)) if values.size else None
