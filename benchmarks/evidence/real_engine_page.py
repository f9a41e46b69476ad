"""The page of real_engine.py: its sentences are computed from the rows that were measured."""

from __future__ import annotations

import textwrap
from statistics import fmean
from typing import Any

Row = dict[str, Any]
_FORECAST = ("delivery_s", "tpot_margin", "iteration_error_std", "law_r2", "capacity_rps")
LEAST_OF_PEAK, MOST_OF_PROBABILITY = 0.9, 2.0
"""Asked for: goodput at 2x and 3x over its peak, and misses among the served over the miss probability."""
HEADRACE_STACK = "Headrace"
COLUMNS = {
    "requests": "requests", "completed": "served", "rejected": "rejected", "timed_out": "timed out",
    "failed": "failed", "goodput_rps": "goodput /s", "served_ttft_miss_fraction": "miss TTFT",
    "served_tpot_miss_fraction": "miss TPOT", "ttft_p50_s": "TTFT p50", "ttft_p99_s": "p99", "tpot_p50_s": "TPOT p50",
    "tpot_p99_s": "p99", "send_lag_p99_s": "send lag, p99",
}


def page(rows: list[Row], about: dict[str, Any]) -> str:
    """The page as Markdown. about: what was run, by the names in `_PAGE`."""
    table = "\n".join(
        f"| {row['load']:g}× | {row['stack']} | {row['start']} | {' | '.join(_cell(row[name]) for name in COLUMNS)} |"
        for row in rows
    )
    ours = [row for row in rows if row["stack"] == HEADRACE_STACK]
    return _PAGE.format(
        **about, columns=" | ".join(COLUMNS.values()), rules="|---" * len(COLUMNS), rows=table,
        judged="\n".join(_bullet(line) for line in [*_of_peak(ours), *_misses(ours), *_beside(rows)]),
        seen=_seen(ours), noise=_noise(rows),
    )


def _bullet(text: str) -> str:
    return textwrap.fill(f"- {text}", 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _of_peak(ours: list[Row]) -> list[str]:
    """Over all starts: the machine is not the same twice."""
    mean = {load: fmean(row["goodput_rps"] for row in ours if row["load"] == load) for load in _loads(ours)}
    peak = max(mean, key=lambda load: mean[load])
    said = f"Mean goodput peaks at {mean[peak]:.2f} requests/s, at {peak:g}×."
    kept = {load: goodput_rps / mean[peak] for load, goodput_rps in mean.items() if load > 1}
    if kept:
        shares = ", ".join(f"{share:.2f} at {load:g}×" for load, share in kept.items())
        said += f" Of this remain {shares}; asked for are {LEAST_OF_PEAK:g}: {_verdict(kept, LEAST_OF_PEAK, 1)}."
    return [said]


def _misses(ours: list[Row]) -> list[str]:
    lines, probability = [], ours[0]["forecast"]["miss_probability"]
    for name in ("ttft", "tpot"):
        times = {}
        for load in _loads(ours):
            rows = [row for row in ours if row["load"] == load]
            count = sum(round(row[f"served_{name}_miss_fraction"] * row["completed"]) for row in rows)
            times[load] = count / sum(row["completed"] for row in rows) / probability
        shares = ", ".join(f"{time * probability:.1%} at {load:g}×" for load, time in times.items())
        lines.append(
            f"Of the served requests {shares} miss the {name.upper()} target; allowed are {MOST_OF_PROBABILITY:g} "
            f"times {probability:.0%}: {_verdict(times, MOST_OF_PROBABILITY, -1)}."
        )
    return lines


def _verdict(values: dict[float, float], limit: float, sign: int) -> str:
    """Met, or at which loads not; sign: 1 where values have to be at least `limit`, −1 for at most."""
    missed = [f"{load:g}×" for load, value in values.items() if sign * value < sign * limit]
    return f"**missed** at {' and '.join(missed)}" if missed else "met"


def _beside(rows: list[Row]) -> list[str]:
    lines = []
    for load in _loads(rows):
        goodput_rps = {
            stack: fmean(row["goodput_rps"] for row in rows if (row["stack"], row["load"]) == (stack, load))
            for stack in dict.fromkeys(row["stack"] for row in rows)
        }
        if len(goodput_rps) > 1:
            said = ", ".join(f"{stack} {value:.2f}/s" for stack, value in goodput_rps.items())
            lines.append(f"Mean goodput at {load:g}×: {said}.")
    return lines


def _loads(rows: list[Row]) -> list[float]:
    return list(dict.fromkeys(row["load"] for row in rows))


def _seen(ours: list[Row]) -> str:
    lines = []
    for row in ours:
        engine, forecast = row["engine"], row["forecast"]
        lines.append(
            f"| {row['load']:g}× | {row['start']} "
            + "".join(f"| {engine[name]} " for name in ("completed", "ttft_misses", "tpot_misses"))
            + "".join(f"| {_cell(forecast[name])} " for name in _FORECAST) + "|"
        )
    return "\n".join(lines)


def _noise(rows: list[Row]) -> str:
    said = []
    for stack, start in dict.fromkeys((row["stack"], row["start"]) for row in rows):
        p50, p90, p99 = next(row["noise"] for row in rows if (row["stack"], row["start"]) == (stack, start))
        said.append(f"{stack}, start {start}: {p90 / p50:.2f} and {p99 / p50:.2f}")
    return "; ".join(said)


def _cell(value: float | int | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


_PAGE = """# Service levels on the real engine

{judged}

Made by `{command}`.

SmolLM2-135M-Instruct in float32 on vLLM's CPU engine, one replica, policy `{policy}`, {cores} cores shared by client,
HTTP and engine. `headrace bench` sends requests of `{lengths}`, Poisson, open loop, over HTTP; 1× is {capacity_rps:g}
requests/s. After each start the stack learns for {learn_s:g} s at 1×; each load then lasts {seconds:g} s, of which
the first {fill_s:g} are not measured. The client gives a request up after {timeout_s:g} s. Targets, held where the
client sees them: first token within {ttft_s:g} s of when the request was due, at most {tpot_s:g} s per further token.
Seconds.

| load | stack | start | {columns} |
|---|---|---{rules}|
{rows}

What Headrace knew when each load had ended: misses that its engine counted, the time that first tokens are taken to
need to leave the replica, how far iterations are kept below the TPOT target, and the iteration-time model's errors.

| load | start | completed | miss TTFT | miss TPOT | delivery s | margin | iteration error | model R² | capacity /s |
|---|---|---|---|---|---|---|---|---|---|
{seen}

The machine's own noise: of equal pieces of work on one core, before the load came, the seconds that a tenth and a
hundredth of them exceeded, over the median. {noise}.
{conditions}
"""
