"""The page of real_engine.py: its sentences are computed from the rows that were measured."""

from __future__ import annotations

from statistics import fmean
from typing import Any

Row = dict[str, Any]
_FORECAST = ("delivery_s", "tpot_margin", "iteration_error_std", "law_r2", "capacity_rps")
LEAST_OF_PEAK, MOST_OF_PROMISE = 0.9, 2.0
"""Asked for: goodput at 2x and 3x over its peak, and misses among the served over the promised share."""
HEADRACE_STACK = "Headrace"
COLUMNS = {
    "requests": "requests", "completed": "served", "rejected": "rejected", "timed_out": "timed out",
    "failed": "failed", "goodput_rps": "goodput /s", "served_ttft_miss_fraction": "miss TTFT",
    "served_tpot_miss_fraction": "miss TPOT", "ttft_p50_s": "TTFT p50", "ttft_p99_s": "p99", "tpot_p50_s": "TPOT p50",
    "tpot_p99_s": "p99", "send_lag_p99_s": "client late, p99",
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
        judged="\n".join(f"- {line}" for line in [*_of_peak(ours), *_misses(ours), *_beside(rows)]),
        seen=_seen(ours), noise=_noise(rows),
    )


def _of_peak(ours: list[Row]) -> list[str]:
    """Over all starts: the machine is not the same twice."""
    mean = {load: fmean(row["goodput_rps"] for row in ours if row["load"] == load) for load in _loads(ours)}
    peak = max(mean, key=lambda load: mean[load])
    lines = [f"The peak of the mean goodput is {mean[peak]:.2f}/s, at {peak:g}×."]
    for load, goodput_rps in mean.items():
        if load > 1:
            share = goodput_rps / mean[peak]
            lines.append(
                f"At {load:g}× it is {share:.2f} of that; asked for are {LEAST_OF_PEAK:g}: "
                f"{'met' if share >= LEAST_OF_PEAK else '**missed**'}."
            )
    return lines


def _misses(ours: list[Row]) -> list[str]:
    lines, promised = [], ours[0]["forecast"]["miss_probability"]
    for load in _loads(ours):
        rows = [row for row in ours if row["load"] == load]
        served = sum(row["completed"] for row in rows)
        for name in ("ttft", "tpot"):
            count = sum(round(row[f"served_{name}_miss_fraction"] * row["completed"]) for row in rows)
            times = count / served / promised
            lines.append(
                f"At {load:g}× {count} of {served} served requests missed the {name.upper()} target, {times:.1f} times "
                f"the promised {promised:.0%}; allowed are {MOST_OF_PROMISE:g} times: "
                f"{'met' if times <= MOST_OF_PROMISE else '**missed**'}."
            )
    return lines


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


_PAGE = """# The promise on the real engine

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

{judged}

What Headrace knew when each load had ended: misses that its engine counted, the time that first tokens are taken to
need to leave the replica, how far iterations are kept below the TPOT target, and the law's errors.

| load | start | completed | miss TTFT | miss TPOT | delivery s | margin | iteration error | law R² | capacity /s |
|---|---|---|---|---|---|---|---|---|---|
{seen}

The machine's own noise: of equal pieces of work on one core, before the load came, the seconds that a tenth and a
hundredth of them exceeded, over the median. {noise}.
{conditions}
"""
