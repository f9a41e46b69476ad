"""The page of `real_traffic.py` from its runs: conclusions, each computed, and the grids behind them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from textwrap import fill
from typing import TYPE_CHECKING, Any

from conclusions import real_traffic
from grids import mean_of
from page_tables import BEGIN, END, with_conclusion
from slo_workloads import Runs, bound_of_run, goodput, summaries

from simulator.sweep import PointResult

if TYPE_CHECKING:
    from real_traffic import Case

WHOLE = {"break_on_hyphens": False, "break_long_words": False}
LATENCY_LOADS = (0.5, 0.9, 1.5)
TITLE = "# Traffic as real engines see it"
INTRODUCTION = """\
Made by `python benchmarks/evidence/real_traffic.py --traces FOLDER --profile FILE`: vLLM's real scheduler and prefix
cache in virtual time, caching on as vLLM has it by default, the controller live from a cold start, the central 60 %
of the requests measured (beyond capacity more arrive, so that as many are served). n is the number of seeds; with
several, means. Goodput in requests/s within both targets. Bound: the fluid capacity for the very requests measured,
counting only the prompt tokens that were computed, or the offered rate if that is less. Rejection times are from
arrival until the client has the response, which takes one and a half iterations at least. Best static: plain vLLM with
the best of the caps and token budgets tried, with clients that leave after 2.5 s without a token. A dash stands where
nothing was run."""
COLUMNS = (
    "| policy | load | n | goodput | bound | TTFT p50, p99 (s) | TPOT p99 (ms) | miss TTFT | miss TPOT | rejected "
    "| rejection p50, p99 (s) | prefix hits | preemptions |"
)


def page(cases: Sequence[Case], runs: Runs) -> str:
    """The whole page."""
    parts = [TITLE, "", BEGIN + END, INTRODUCTION, "", "## By workload", ""]
    parts += [fill(f"- {_conclusion(case, runs)}", 119, subsequent_indent="  ", **WHOLE) for case in cases]
    for case in cases:
        parts += ["", f"## {case.name}", "", f"Load 1 stands for {case.rate_rps:g} requests/s.", ""]
        parts += [*case.remark, ""] if case.remark else []
        parts += [*_grid(case, runs), *_beyond(case, runs), *_latency(case, runs)]
    return with_conclusion("\n".join(parts) + "\n", real_traffic)


def _loads(case: Case, what: str, runs: Runs) -> list[float]:
    loads = {*case.loads, *case.rival_loads, *case.static_loads}
    return [load for load in sorted(loads) if summaries(runs, case.group(load, what))]


def _bound_rps(results: Sequence[PointResult]) -> float:
    """What the fluid can serve of the very requests measured, at most what is offered; mean over seeds."""
    return mean(
        min(bound_of_run(result), run["window_requests"] / (run["window_to_s"] - run["window_from_s"]))
        for result in results if (run := result.summary)
    )


def _conclusion(case: Case, runs: Runs) -> str:
    loads = _loads(case, "fluid", runs)
    if not loads:
        return f"{case.name}: not run."
    reached = {load: mean_of(summaries(runs, case.group(load, "fluid")), "goodput_rps") for load in loads}
    shares = [reached[load] / _bound_rps(runs[case.group(load, "fluid")]) for load in loads]
    missed = [
        max(mean_of(summaries(runs, case.group(load, "fluid")), f"served_{name}_miss_fraction") for load in loads)
        for name in ("ttft", "tpot")
    ]
    said = (
        f"{case.name}: `fluid` reaches {min(shares):.2f} to {max(shares):.2f} of the bound over loads {min(loads):g} "
        f"to {max(loads):g}; of the served at most {missed[0]:.1%} miss TTFT and {missed[1]:.1%} TPOT."
    )
    beyond = [load for load in loads if load > 1]
    if beyond:
        kept = min(reached[load] for load in beyond) / max(reached.values())
        said += f" From {min(beyond):g} on it keeps {kept:.2f} of its peak."
    for load in beyond:
        said += _beside(case, load, reached[load], runs)
    return said + _first_tokens(case, runs) + _uncached(case, reached, runs)


def _beside(case: Case, load: float, reached_rps: float, runs: Runs) -> str:
    """The best rule that others ship, and the best static setting, at a load beyond capacity."""
    said = ""
    shipped = {rival: summaries(runs, case.group(load, rival)) for rival in case.rivals}
    best_rps, best = max(
        ((mean_of(some, "goodput_rps"), name) for name, some in shipped.items() if some), default=(0.0, "")
    )
    if best:
        said += f" At {load:g} it has {reached_rps:.2f}, the best shipped rule, {best}, {best_rps:.2f}"
        static = [goodput(summary) for summary in summaries(runs, case.group(load, "static"))]
        said += f", the best of {len(static)} static settings {max(static):.2f}." if static else "."
    return said


def _first_tokens(case: Case, runs: Runs) -> str:
    said = ""
    for load in (load for load in case.loads if load < 1):
        ours = [r.summary for r in runs.get(case.group(load, "fluid"), []) if r.summary and r.options["seed"] == 1]
        theirs = summaries(runs, case.group(load, "vllm"))
        if ours and theirs and theirs[0]["ttft_p99_s"]:
            ratio = ours[0]["ttft_p99_s"] / theirs[0]["ttft_p99_s"]
            said += f" p99 TTFT at load {load:g} is {ratio:.2f} of plain vLLM's (same seed)."
    return said


def _uncached(case: Case, reached: dict[float, float], runs: Runs) -> str:
    loads = [load for load in reached if summaries(runs, case.group(load, "uncached"))]
    if not loads:
        return ""
    ratios = [reached[load] / mean_of(summaries(runs, case.group(load, "uncached")), "goodput_rps") for load in loads]
    return f" Prefix caching multiplies goodput by {min(ratios):.2f} to {max(ratios):.2f}."


def _grid(case: Case, runs: Runs) -> list[str]:
    lines = [COLUMNS, "|" + "---|" * (COLUMNS.count("|") - 1)]
    for what in ("fluid", "uncached", *case.rivals):
        for load in _loads(case, what, runs):
            results = runs[case.group(load, what)]
            name = "`fluid`, caching off" if what == "uncached" else f"`{what}`"
            lines.append(f"| {name} | {load:g} {_row([r.summary for r in results if r.summary])}".replace(
                "BOUND", f"{_bound_rps(results):.2f}" if what == "fluid" else "–"
            ))
    for load in _loads(case, "static", runs):
        chosen = max(runs[case.group(load, "static")], key=lambda result: goodput(result.summary))
        setting = f"best static: cap {chosen.options['cap']}, budget {chosen.options['token_budget']}"
        lines.append(f"| {setting} | {load:g} {_row([chosen.summary or {}])}".replace("BOUND", "–"))
    return lines


def _row(each: list[dict[str, Any]]) -> str:
    def of(key: str, digits: int = 2, unit: float = 1.0) -> str:
        values = [summary[key] for summary in each if summary.get(key) is not None]
        return f"{unit * mean(values):.{digits}f}" if values else "–"

    def share(key: str) -> str:
        values = [summary[key] for summary in each if summary.get(key) is not None]
        return _share(mean(values) if values else None)

    return (
        f"| {len(each)} | {of('goodput_rps')} | BOUND | {of('ttft_p50_s')}, {of('ttft_p99_s')} "
        f"| {of('tpot_p99_s', 1, 1000)} | {share('served_ttft_miss_fraction')} | {share('served_tpot_miss_fraction')} "
        f"| {of('rejected_in_window', 0)} | {of('rejection_p50_s')}, {of('rejection_p99_s')} "
        f"| {of('prefix_hit_fraction')} | {of('preemptions', 0)} |"
    )


def _beyond(case: Case, runs: Runs) -> list[str]:
    """Clients that come back, and whether rejections were right."""
    loads = [load for load in case.loads if load > 1]
    rows = []
    for load in loads:
        once, back, audit = (summaries(runs, case.group(load, what)) for what in ("fluid", "retries", "audit"))
        if not once or not (back or audit):
            continue
        row = f"| {load:g} | {goodput(once[0]):.2f} "
        row += f"| {goodput(back[0]):.2f} | {_share(back[0]['returned_admitted_fraction'])} " if back else "| – | – "
        found = audit[0] if audit else {}
        row += f"| {_share(found.get('wrong_rejection_fraction'))} ({_share(found.get('wrong_rejection_low'))} to "
        row += f"{_share(found.get('wrong_rejection_high'))}) | {_share(found.get('wrong_admission_fraction'))} |"
        rows.append(row)
    if not rows:
        return []
    return [
        "", "Clients that come back as the openai client does, and the audit by replay (95 % interval), first seed:",
        "",
        "| load | goodput | with clients that come back | of those, admitted | wrong rejections | wrong admissions |",
        "|---|---|---|---|---|---|", *rows,
    ]


def _latency(case: Case, runs: Runs) -> list[str]:
    """Goodput under a latency target alone."""
    rows = []
    for latency_s in case.latency_s:
        for load in LATENCY_LOADS:
            ours, plain, static = (
                summaries(runs, case.group(load, f"latency-{latency_s:g}-{what}"))
                for what in ("fluid", "vllm", "static")
            )
            if ours:
                best = f"{max(goodput(summary) for summary in static):.2f}" if static else "–"
                rows.append(
                    f"| {latency_s:g} | {load:g} | {goodput(ours[0]):.2f} | {goodput(plain[0]) if plain else 0:.2f} "
                    f"| {best} | {ours[0]['rejected_in_window']} |"
                )
    if not rows:
        return []
    return [
        "", "A latency target alone (goodput: requests/s that end within it), first seed:", "",
        "| latency target (s) | load | `fluid` | plain vLLM | best static cap | rejected |",
        "|---|---|---|---|---|---|", *rows,
    ]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
