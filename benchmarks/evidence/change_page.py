"""The page docs/evidence/change.md from the runs of `change.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conclusions import change
from grids import mean_of, with_spread
from page_tables import with_conclusion
from settling import PARAMETERS, settling
from slo_workloads import Runs, goodput, static_cell, static_of, summaries

from simulator.output.run_files import read_run

if TYPE_CHECKING:
    from change import Scenario

COMMAND = "python benchmarks/evidence/change.py --traces FOLDER"
REQUIRED = 1.10


def page(scenarios: Sequence[Scenario], baselines: Sequence[str], rates: dict[str, float], runs: Runs) -> str:
    """The whole page."""
    text = PAGE.format(
        command=COMMAND, baselines=" | ".join(baselines), ruler="|---" * (len(baselines) + 5) + "|",
        rows="\n".join(goodput_row(one, baselines, rates[one.name], runs) for one in scenarios),
        settling="\n".join(row for one in scenarios for row in settling_rows(one, runs)),
        about="\n".join(f"- **{one.name}**: {one.about}." for one in scenarios), required=REQUIRED,
    )
    return with_conclusion(text, change)


def goodput_row(one: Scenario, baselines: Sequence[str], rate: float, runs: Runs) -> str:
    """The goodput of all policies in a scenario, and ours over the oracle's on the seed that both ran."""
    row = [one.name, f"{rate:g}"]
    for name in baselines:
        several = summaries(runs, f"{one.name}-{name}")
        row.append(with_spread(several, "goodput_rps") if several else "–")
    best, ours = static_of(runs, f"{one.name}-static"), summaries(runs, f"{one.name}-fluid", seeds=(1,))
    row.append(static_cell(runs, f"{one.name}-static"))
    row.append(f"{goodput(ours[0]) / goodput(best.summary):.3f}" if best and ours else "–")
    row.append(f"{mean_of(ours, 'preemptions'):.0f}" if ours else "–")
    return f"| {' | '.join(row)} |"


def settling_rows(one: Scenario, runs: Runs) -> list[str]:
    """After each lasting change: the control cycles until each parameter stays put, and the swing afterwards."""
    first = next((run for run in runs.get(f"{one.name}-fluid", []) if run.options["seed"] == 1), None)
    if first is None or not one.changes_s:
        return []
    history = read_run(Path(first.folder)).control().to_pylist()
    rows = []
    for begin, end in zip(one.changes_s, (*one.changes_s[1:], one.seconds), strict=True):
        alone = [str(settling(history, begin, end, (name,)).passes) for name in PARAMETERS]
        together = settling(history, begin, end)
        cells = [one.name, f"{begin:g} s", *alone, str(together.passes), f"{together.swing:.1%}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


PAGE = """# While load, lengths and hardware change

<!-- conclusion: begin -->
<!-- conclusion: end -->

Made by `{command}`. Goodput in requests/s: of the requests between 10 % and 95 % of
the arrival order, those that met both targets, TTFT ≤ 3 s and 80 ms per further token on average. Profile
`a100-llama2-7b`, vLLM's real scheduler with asynchronous scheduling, 360 virtual seconds; one seed, and where a cell
has a range, mean and range over three. Capacity is the fluid bound.

{about}

`fluid` has the targets and nothing else; its controller starts from the profile's iteration-time model and a prior for
lengths, and solves anew every 5 s. "Best static" is an oracle: the best single setting for that very run, of a grid of
caps (around the number of running requests of each workload of the scenario, and between them), token budgets (512 and
1 024) and, for the best of these, times after which clients leave (1, 2, 2.5 s) and caps 6 % beside it; "of 9" says how
many of these settings were run. Required: `fluid` over it at least {required:.2f}.

## Goodput

| scenario | rate /s | {baselines} | best static | fluid / static | fluid: preemptions |
{ruler}
{rows}

Where load steps, follows a sine or comes in bursts, lengths stay as they are and so does the best cap: there a static
setting can be near the fluid bound, and no policy that serves in the order of arrival has much to gain. A change of
the mix is what a single setting cannot follow, and no static setting anticipates a slowdown. Requests that already run
when a replica slows down miss their target under any policy.

## How fast parameters settle

Control cycles (5 s each) after a lasting change until a parameter that is active stays within 5 % (a queue limit:
within one request) of its last value, and the largest change from cycle to cycle afterwards. Where a trace replaces
another with far longer outputs, estimates follow as these outputs end.

| scenario | change at | iteration time | prompt flow | queue limit | all | swing afterwards |
|---|---|---|---|---|---|---|
{settling}
"""
