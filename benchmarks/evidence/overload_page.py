"""The page docs/evidence/overload.md from the runs of `overload.py`: measures first, then a table for each workload."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from conclusions import overload
from grids import mean_of, slug, with_spread
from page_tables import draw_goodput, tables, titled, with_conclusion
from slo_workloads import TTFT_S, Runs, bound_of_run, goodput, ratio, static_cell, static_summaries, summaries

if TYPE_CHECKING:
    from overload import Case, ComparedPolicy

COMMAND = "python benchmarks/evidence/overload.py --traces FOLDER"
SHIPPED = ("vllm", "vllm-queue", "vllm-watermark", "dynamo", "llm-d")
BEYOND = (1.2, 1.5, 2.0, 3.0)
LIGHT = (0.3, 0.5, 0.7)
DRAWN = ("vllm", "llm-d", "dynamo", "fluid")


class Worst(NamedTuple):
    """The worst value that a measure takes, and where."""

    value: float
    where: str


class Measure(NamedTuple):
    """What is required: `at_least` (else at most) `required` everywhere."""

    about: str
    required: float
    at_least: bool
    values: Callable[[Case, Runs, float], Iterable[tuple[float | None, str]]]
    only: str = ""

    def worst(self, cases: Sequence[Case], bounds: dict[str, float], runs: Runs) -> Worst | None:
        """Over the workloads that were named in advance; None when nothing was run."""
        reached = [
            Worst(value, f"{case.workload.name}{place}")
            for case in cases if case.named and case.workload.name.startswith(self.only)
            for value, place in self.values(case, runs, bounds[case.workload.name]) if value is not None
        ]
        return (min if self.at_least else max)(reached, default=None)

    def row(self, cases: Sequence[Case], bounds: dict[str, float], runs: Runs) -> str:
        """The measure's line in the table."""
        sign, worst = "≥" if self.at_least else "≤", self.worst(cases, bounds, runs)
        if worst is None:
            return f"| {self.about} | {sign} {self.required:g} | not run | | |"
        met = worst.value >= self.required if self.at_least else worst.value <= self.required
        cells = [self.about, f"{sign} {self.required:g}", f"{worst.value:.3g}", worst.where, "yes" if met else "no"]
        return table_row(cells)


def group(case: Case, load: float, baseline: str) -> str:
    """The name of a baseline's runs."""
    return f"{slug(case.workload.name)}-{load:g}-{baseline}"


def mean_goodput(runs: Runs, case: Case, load: float, baseline: str) -> float | None:
    """Over seeds; None when it was not run."""
    several = summaries(runs, group(case, load, baseline))
    return mean_of(several, "goodput_rps") if several else None


def peak(case: Case, runs: Runs) -> float | None:
    """The highest goodput of `fluid` at any load."""
    return max((g for load in case.loads if (g := mean_goodput(runs, case, load, "fluid")) is not None), default=None)


def over_own_peak(case: Case, runs: Runs, bound: float) -> Iterable[tuple[float | None, str]]:
    best = peak(case, runs)
    for load in BEYOND:
        reached = mean_goodput(runs, case, load, "fluid")
        yield (reached / best if reached is not None and best else None), f" at {load:g}"


def peak_over_bound(case: Case, runs: Runs, bound: float) -> Iterable[tuple[float | None, str]]:
    best = peak(case, runs)
    yield (best / bound if best else None), ""


def over_static(case: Case, runs: Runs, bound: float) -> Iterable[tuple[float | None, str]]:
    for load in case.static:
        yield static_ratio(case, load, runs), f" at {load:g}"


def static_ratio(case: Case, load: float, runs: Runs) -> float | None:
    """Our goodput over the oracle's, on the seeds that both ran."""
    theirs = static_summaries(runs, group(case, load, "static"))
    ours = {r.options["seed"]: r.summary for r in runs.get(group(case, load, "fluid"), []) if r.summary}
    both = ours.keys() & theirs.keys()
    below = sum(goodput(theirs[seed]) for seed in both)
    return sum(goodput(ours[seed]) for seed in both) / below if below else None


def over_vllm(key: str, loads: Sequence[float], suffix: str = "") -> Callable[..., Iterable[tuple[float | None, str]]]:
    def values(case: Case, runs: Runs, bound: float) -> Iterable[tuple[float | None, str]]:
        for load in loads:
            pair = (group(case, load, f"{name}{suffix}") for name in ("fluid", "vllm"))
            yield ratio(runs, *pair, key), f" at {load:g}"

    return values


def median_ttft(case: Case, runs: Runs, bound: float) -> Iterable[tuple[float | None, str]]:
    several = summaries(runs, group(case, 2.0, "fluid"))
    yield (mean_of(several, "ttft_p50_s") / TTFT_S if several else None), ""


def preemptions(case: Case, runs: Runs, bound: float) -> Iterable[tuple[float | None, str]]:
    for load in case.loads:
        for baseline in ("fluid", "fluid-without-targets"):
            several = summaries(runs, group(case, load, baseline))
            lost = max((float(one["preemptions"]) for one in several), default=None)
            yield lost, f" at {load:g}{baseline.removeprefix('fluid').replace('-', ' ')}"


def over_shipped(case: Case, runs: Runs, bound: float) -> Iterable[tuple[float | None, str]]:
    if "trace" not in case.workload.source:
        return
    for load in BEYOND:
        ours = mean_goodput(runs, case, load, "fluid")
        theirs = [g for name in SHIPPED if (g := mean_goodput(runs, case, load, name)) is not None]
        if ours is not None and theirs:
            yield (ours / max(theirs) if max(theirs) else float("inf")), f" at {load:g}"


MEASURES = (
    Measure("goodput at 1.2 to 3 over its own peak", 0.95, True, over_own_peak),
    Measure("peak goodput over the fluid bound", 0.97, True, peak_over_bound),
    Measure("goodput over the best static setting", 1.0, True, over_static),
    Measure("goodput over the best static setting, Azure conversation", 1.08, True, over_static, only="Azure"),
    Measure("goodput at 1.2 to 3 over the best rule that others ship, traces", 2.0, True, over_shipped),
    Measure("mean latency over plain vLLM's, up to 0.7", 1.01, False, over_vllm("latency_mean_s", LIGHT)),
    Measure("p99 TTFT over plain vLLM's, up to 0.7", 1.01, False, over_vllm("ttft_p99_s", LIGHT)),
    Measure("median TTFT at 2 over the target", 0.5, False, median_ttft),
    Measure("preemptions", 0, False, preemptions),
    Measure(
        "mean latency without targets over plain vLLM's, 0.9 to 1.1", 1.0, False,
        over_vllm("latency_mean_s", (0.9, 1.0, 1.1), "-without-targets"),
    ),
)


def page(cases: Sequence[Case], baselines: Sequence[ComparedPolicy], bounds: dict[str, float], runs: Runs) -> str:
    """The whole page."""
    measures = [measure.row(cases, bounds, runs) for measure in MEASURES]
    drawn = any(name.startswith("Azure") for name in bounds)
    text = PAGE.format(
        figure=FIGURE if drawn else "", command=COMMAND, measures="\n".join(measures),
        named="\n".join(section(case, baselines, bounds, runs) for case in cases if case.named),
        light="\n".join(light_rows(cases, runs)),
        without_targets="\n".join(without_target_rows(cases, runs)),
        others="\n".join(section(case, baselines, bounds, runs) for case in cases if not case.named),
    )
    return with_conclusion(text, overload)


def draw(stem: Path, text: str, bounds: dict[str, float]) -> None:
    """Goodput on the Azure conversation against the arrival rate, from the page's own tables."""
    names = {target: f"Azure conversation, {target}" for target in ("80 ms", "50 ms")}
    panels = {target: (titled(tables(text), name), bounds[name]) for target, name in names.items() if name in bounds}
    if panels:
        draw_goodput(stem, "Azure conversation", panels, DRAWN)


def section(case: Case, baselines: Sequence[ComparedPolicy], bounds: dict[str, float], runs: Runs) -> str:
    """One workload's table: goodput by load."""
    names = [baseline.name for baseline in baselines if baseline.name in case.baselines]
    head = ["load", *names, "best static", "fluid / static", "fluid / own bound", "fluid: p50 TTFT"]
    lines = [table_row(head), "|---" * len(head) + "|"]
    for load in case.loads:
        row = [f"{load:g}"]
        for name in names:
            several = summaries(runs, group(case, load, name))
            row.append(with_spread(several, "goodput_rps") if several else "–")
        over = static_ratio(case, load, runs)
        row.append(static_cell(runs, group(case, load, "static")))
        row.append("–" if over is None else f"{over:.3f}")
        row.append(over_own_bound(case, load, runs) if load >= 1 else "–")
        fluid = summaries(runs, group(case, load, "fluid"))
        row.append(f"{mean_of(fluid, 'ttft_p50_s'):.2f} s" if fluid else "–")
        lines.append(table_row(row))
    title = f"{'##' if case.named else '###'} {case.workload.name}"
    return "\n".join([title, "", f"Fluid bound {bounds[case.workload.name]:.2f} /s.", "", *lines, ""])


def over_own_bound(case: Case, load: float, runs: Runs) -> str:
    """Our goodput over the fluid bound of the very requests measured, mean over seeds."""
    ratios = [goodput(run.summary) / bound_of_run(run) for run in runs.get(group(case, load, "fluid"), [])]
    return f"{mean(ratios):.3f}" if ratios else "–"


def light_rows(cases: Sequence[Case], runs: Runs) -> list[str]:
    """Mean latency and p99 TTFT below capacity."""
    return [
        table_row([case.workload.name, f"{load:g}", *pair_of(case, load, "", runs, ("latency_mean_s", "ttft_p99_s"))])
        for case in cases for load in LIGHT
        if case.named and summaries(runs, group(case, load, "fluid"))
    ]


def without_target_rows(cases: Sequence[Case], runs: Runs) -> list[str]:
    """Mean latency and preemptions without targets."""
    rows = []
    for case in cases:
        for load in (0.9, 1.0, 1.1):
            if case.free and summaries(runs, group(case, load, "fluid-without-targets")):
                pairs = pair_of(case, load, "-without-targets", runs, ("latency_mean_s", "preemptions"))
                rows.append(table_row([case.workload.name, f"{load:g}", *pairs]))
    return rows


def pair_of(case: Case, load: float, suffix: str, runs: Runs, keys: Sequence[str]) -> list[str]:
    """Of each measure: plain vLLM's, ours, and ours over it."""
    cells = []
    for key in keys:
        names = [group(case, load, f"{name}{suffix}") for name in ("vllm", "fluid")]
        values: list[list[dict[str, Any]]] = [summaries(runs, name, seeds=(1,)) for name in names]
        cells += [f"{mean_of(several, key):.3g}" if several else "–" for several in values]
        over = ratio(runs, names[1], names[0], key)
        cells.append("–" if over is None else f"{over:.3f}")
    return cells


def table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


FIGURE = """![Goodput against the arrival rate, Azure conversation](figures/overload-azure.svg)

"""
PAGE = """# Goodput below, at and beyond capacity

<!-- conclusion: begin -->
<!-- conclusion: end -->

{figure}Made by `{command}` (the folder has azure_conv_2023.csv and
lmsys_lengths.csv; without it only the synthetic workloads are run). Goodput in requests/s: those that arrived in the
central window and met both targets, TTFT ≤ 3 s and the mean time per output token named. Poisson arrivals at multiples
of the fluid bound, the capacity with every iteration within the target; profile `a100-llama2-7b`, 137 000 KV tokens,
vLLM's real scheduler with asynchronous scheduling. One seed; where a cell has a range, mean and range over three. A
dash: not run.

## What is required, and the worst that was reached

| measure | required | worst | where | met |
|---|---|---|---|---|
{measures}

`vllm-queue` is V1 with max_num_queued_tokens = target TTFT × prefill rate, `vllm-watermark` keeps 5 % of memory free,
`dynamo` and `llm-d` are their rules at documented defaults, with always fresh statistics. `strict-wait` and
`strict-nested-wait` are the paper's literal rules, their counts following from the fluid model's running requests as in
the paper's experiments. `fluid` has the targets and nothing else: its controller starts from the profile's
iteration-time model and a prior for lengths, and solves anew every 5 s from the replica's own telemetry. "Best static"
is an oracle: the best of a grid of caps and token budgets with clients that leave after 2.5 s, found for that very
workload and load on the first seed; at 2 also with clients that leave after 1 and 2 s and with caps 6 % beside the
best. The cell is the mean of the seeds that the best one was run on, and static and `fluid` are compared on the seeds
that both ran. "Of 9" says how many settings were run. "Own bound" is the fluid bound for the lengths of the very
requests that a run measures: a window of 1 000 requests of the Azure conversation has a bound that differs by ±4 % from
the trace's. Runs that could not work off what is left (strict rules, the watermark, and on the longest answers all but
`fluid`) end once every measured request has met or missed its targets, which changes no goodput (`until_decided`).

Plain vLLM and the shipped rules bound queues or memory, and neither is what a TPOT target needs. Where goodput on the
traces differs by less than 3 %, the difference is chance: which requests are served decides about their mean length.
"Own bound" takes out the part that arrivals cause.

{named}
## Below capacity

Mean latency and p99 TTFT in seconds, up to 0.7 of capacity. `fluid` computes long prompts in several iterations unless
the running requests have TPOT slack, which shows in the p99 TTFT.

| workload | load | latency: vllm | fluid | ratio | p99 TTFT: vllm | fluid | ratio |
|---|---|---|---|---|---|---|---|
{light}

## Without targets

Mean latency in seconds over all requests of the central window, and preemptions of the whole run; `fluid` has no
target and rejects no request. Memory may overflow with a probability of 1 %.

| workload | load | latency: vllm | fluid | ratio | preemptions: vllm | fluid | ratio |
|---|---|---|---|---|---|---|---|
{without_targets}

## Workloads that `fluid` was not designed on

Lognormal lengths: prompts of mean 2 500 (coefficient of variation 0.3) with outputs of mean 300 (1.2; some beyond
1 000), and prompts of mean 1 400 (0.5) with outputs of mean 28 (0.8); what is longer than 4 096 tokens in all is left
out.

{others}"""
