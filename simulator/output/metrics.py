"""What requests say: latency, time to first token, time per output token, and whether they are good.

The one place where these are defined: for simulated runs, for the load generator's measurements, and for one request.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scheduler.tuning.slo import NO_SLO, Slo
from simulator.output.rows import COMPLETED, GAVE_UP, REJECTED
from simulator.output.run_files import REQUESTS_FILE

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
LEAST_REQUESTS_FOR_A_WINDOW = 10

ReadColumn = Callable[[str], pa.ChunkedArray]


class Delays(NamedTuple):
    """Seconds, of one request (floats) or of many (arrays): end to end, to the first token, per further token.

    The time per further token of an answer of one token is NaN.
    """

    latency_s: Any
    ttft_s: Any
    tpot_s: Any


def delays_of(since_s: Any, first_token_s: Any, finished_s: Any, output_tokens: Any) -> Delays:
    """The delays of a request that its client sent at `since_s`, or of many, from clock seconds and token counts."""
    decoding_s, later_tokens = np.asarray(finished_s - first_token_s, np.float64), np.asarray(output_tokens) - 1
    tpot_s = np.divide(decoding_s, later_tokens, out=np.full_like(decoding_s, np.nan), where=later_tokens > 0)
    return Delays(finished_s - since_s, first_token_s - since_s, tpot_s)


def meets(delays: Delays, slo: Slo) -> Mask:
    """Whether a completed request is good: within every target that is given. NaN is within any; one value a request.

    Of a request that is under way, with its delays so far, whether it may still be.
    """
    return (
        _within(delays.latency_s, slo.latency_s)
        & _within(delays.ttft_s, slo.ttft_s)
        & _within(delays.tpot_s, slo.tpot_s)
    )


def _within(seconds: Any, target_s: float | None) -> Mask:
    everything = np.ones(np.shape(seconds), dtype=np.bool_)
    return everything if target_s is None else ~(np.asarray(seconds) > target_s)


def summarise(
    requests: pa.Table | Path,
    *,
    window: tuple[float, float] = (0.3, 0.9),
    slo_ttft_s: float | None,
    slo_tpot_s: float | None,
    slo_latency_s: float | None = None,
) -> dict[str, Any]:
    """The measures of a run, JSON-ready.

    `requests` is a table with REQUEST_SCHEMA's columns, a Parquet file of them, or a run's folder; from a file only a
    few columns are in memory at a time. `window` are two fractions of the arrival order: of n requests, those numbered
    int(a·n) to int(b·n) − 1 are measured, so that neither the filling nor the draining of the system counts. Below 10
    requests the window is the whole run.

    Keys: `requests`, `completed`, `rejected` count the whole run. `window_from_s` and `window_to_s` are the arrivals of
    the window's first and last request, `window_requests` their number. `goodput_rps` counts requests that arrived in
    the window, completed, and met every target that is given; `throughput_rps` and `output_tokens_per_s` count
    requests that finished between `window_from_s` and `window_to_s`. `latency_*`, `ttft_*` and `tpot_*` (`mean_s`,
    `p50_s`, `p99_s`) are over the completed requests that arrived in the window; an output of one token has no time
    per output token, and meets that target. Undefined values are None. All of a request's delays count from its
    last attempt (`returned_s`, else `arrival_s`).

    `gave_up` counts requests given up by their clients without a first token, over the whole run; not rejections.
    `prefix_hit_fraction`: tokens that were found cached, of the prompt tokens of all requests that ran.
    `served_ttft_miss_fraction` and `served_tpot_miss_fraction`: of the completed requests of the window, those that
    missed that target; `wrong_admission_fraction`: those that missed any. `rejected_in_window`: requests of the window
    that were rejected; `rejection_p50_s` and `rejection_p99_s`: from their last attempt to the rejection.

    Raises:
        ValueError: the window is not two rising fractions, or a target is not > 0.
    """
    _check(window, slo_ttft_s=slo_ttft_s, slo_tpot_s=slo_tpot_s, slo_latency_s=slo_latency_s)
    read = _reader(requests)
    completed, rejected = _is(read("outcome"), COMPLETED), _is(read("outcome"), REJECTED)
    result: dict[str, Any] = {
        "requests": len(completed), "completed": int(completed.sum()), "rejected": int(rejected.sum()),
        "gave_up": int(_is(read("outcome"), GAVE_UP).sum()),
    }
    in_window = _in_window(read("index").to_numpy(), window)
    arrivals_s = _floats(read("arrival_s"))[in_window]
    from_s, to_s = (float(arrivals_s.min()), float(arrivals_s.max())) if arrivals_s.size else (math.nan, math.nan)
    result |= {
        "window_from_s": from_s if arrivals_s.size else None,
        "window_to_s": to_s if arrivals_s.size else None,
        "window_requests": int(in_window.sum()),
    }

    delays = _delays(read, in_window & completed)
    targets = Slo(slo_ttft_s, slo_tpot_s, slo_latency_s)
    met = meets(delays, targets)
    rejection_s = (_floats(read("rejected_s")) - _since_s(read))[in_window & rejected]
    finished_inside = _between(_floats(read("finished_s")), from_s, to_s) & completed
    output_tokens = int(read("output_tokens").to_numpy()[finished_inside].sum())
    return result | {
        "goodput_rps": _rate(int(met.sum()), to_s - from_s),
        "throughput_rps": _rate(int(finished_inside.sum()), to_s - from_s),
        "output_tokens_per_s": _rate(output_tokens, to_s - from_s),
        **{
            f"{name}_{key}": value
            for name, seconds in _by_name(delays).items() for key, value in _statistics(seconds).items()
        },
        "prefix_hit_fraction": _prefix_hits(read),
        "served_ttft_miss_fraction": _missed(_within(delays.ttft_s, slo_ttft_s), slo_ttft_s is not None),
        "served_tpot_miss_fraction": _missed(_within(delays.tpot_s, slo_tpot_s), slo_tpot_s is not None),
        "wrong_admission_fraction": _missed(met, targets != NO_SLO),
        "rejected_in_window": int((in_window & rejected).sum()),
        **{f"rejection_{key}": _statistics(rejection_s)[key] for key in ("p50_s", "p99_s")},
    }


def good_requests(requests: pa.Table | Path, window: tuple[float, float], targets: Slo) -> frozenset[int]:
    """Numbers of the requests that `summarise` counts as goodput."""
    read = _reader(requests)
    index = read("index").to_numpy()
    chosen = _in_window(index, window) & _is(read("outcome"), COMPLETED)
    return frozenset(index[chosen][meets(_delays(read, chosen), targets)].tolist())


def rejected_requests(requests: pa.Table | Path, window: tuple[float, float]) -> list[int]:
    """Numbers of the rejected requests of the window, ascending."""
    read = _reader(requests)
    index = read("index").to_numpy()
    return sorted(index[_in_window(index, window) & _is(read("outcome"), REJECTED)].tolist())


def window_of(requests: int, window: tuple[float, float]) -> range:
    """Which of so many requests, by the order of their arrival, are measured (see `summarise`)."""
    if requests < LEAST_REQUESTS_FOR_A_WINDOW:
        return range(requests)
    first = int(requests * window[0])
    return range(first, max(int(requests * window[1]), first + 1))


def request_delays_s(
    requests: pa.Table | Path, *, from_s: float = -math.inf, to_s: float = math.inf
) -> dict[str, Floats]:
    """Latency, time to first token and time per output token of the completed requests that arrived in [from_s, to_s].

    Arrays under `latency`, `ttft` and `tpot`, one value a request in the order of the rows; the `tpot` of an answer of
    one token is NaN.
    """
    read = _reader(requests)
    chosen = _is(read("outcome"), COMPLETED) & _between(_floats(read("arrival_s")), from_s, to_s)
    return _by_name(_delays(read, chosen))


def _check(window: tuple[float, float], **targets_s: float | None) -> None:
    if not 0 <= window[0] < window[1] <= 1:
        raise ValueError(f"window is {window!r}; it must be two fractions 0 <= a < b <= 1")
    for name, target_s in targets_s.items():
        if target_s is not None and not target_s > 0:
            raise ValueError(f"{name} is {target_s!r}; it must be a number > 0, or None for no target")


def _reader(requests: pa.Table | Path) -> ReadColumn:
    if isinstance(requests, pa.Table):
        return requests.column  # type: ignore[no-any-return]
    path = requests / REQUESTS_FILE if requests.is_dir() else requests
    return lambda name: pq.read_table(path, columns=[name]).column(name)


def _floats(column: pa.ChunkedArray) -> Floats:
    """Nulls become NaN."""
    return np.asarray(column.to_numpy(), dtype=np.float64)


def _is(column: pa.ChunkedArray, value: str) -> Mask:
    return np.asarray(pc.equal(column, value).to_numpy(), dtype=np.bool_)


def _in_window(index: NDArray[np.int64], window: tuple[float, float]) -> Mask:
    measured = np.sort(index)[(places := window_of(len(index), window)).start : places.stop]
    return np.isin(index, measured)


def _delays(read: ReadColumn, chosen: Mask) -> Delays:
    first_s, finished_s, output_tokens = (
        _floats(read(name))[chosen] for name in ("first_token_s", "finished_s", "output_tokens")
    )
    return delays_of(_since_s(read)[chosen], first_s, finished_s, output_tokens)


def _by_name(delays: Delays) -> dict[str, Floats]:
    return {"latency": delays.latency_s, "ttft": delays.ttft_s, "tpot": delays.tpot_s}


def _since_s(read: ReadColumn) -> Floats:
    """When each request's last attempt began."""
    returned_s = _floats(read("returned_s"))
    return np.where(np.isnan(returned_s), _floats(read("arrival_s")), returned_s)


def _prefix_hits(read: ReadColumn) -> float | None:
    cached_tokens = _floats(read("cached_tokens"))
    ran = ~np.isnan(cached_tokens)
    prompt_tokens = float(read("prompt_tokens").to_numpy()[ran].sum())
    return float(cached_tokens[ran].sum()) / prompt_tokens if prompt_tokens else None


def _missed(met: Mask, has_target: bool) -> float | None:
    return 1 - float(met.mean()) if met.size and has_target else None


def _between(seconds: Floats, from_s: float, to_s: float) -> Mask:
    return np.asarray((seconds >= from_s) & (seconds <= to_s))


def _rate(count: int, span_s: float) -> float | None:
    return count / span_s if span_s > 0 else None


def _statistics(seconds: Floats) -> dict[str, float | None]:
    seconds = seconds[~np.isnan(seconds)]
    if not seconds.size:
        return {"mean_s": None, "p50_s": None, "p99_s": None}
    p50_s, p99_s = np.percentile(seconds, (50, 99))
    return {"mean_s": float(seconds.mean()), "p50_s": float(p50_s), "p99_s": float(p99_s)}
