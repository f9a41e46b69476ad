"""The page docs/evidence/change.md from the runs of `change.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grids import mean_of, with_spread
from promises import Runs, goodput, static_cell, static_of, summaries
from settling import PARAMETERS, settling

from simulator.output.run_files import read_run

if TYPE_CHECKING:
    from change import Scenario

COMMAND = "python benchmarks/evidence/change.py --traces FOLDER"
REQUIRED = 1.10


def page(scenarios: Sequence[Scenario], baselines: Sequence[str], rates: dict[str, float], runs: Runs) -> str:
    """The whole page."""
    return PAGE.format(
        command=COMMAND, baselines=" | ".join(baselines), ruler="|---" * (len(baselines) + 5) + "|",
        rows="\n".join(goodput_row(one, baselines, rates[one.name], runs) for one in scenarios),
        settling="\n".join(row for one in scenarios for row in settling_rows(one, runs)),
        about="\n".join(f"- **{one.name}**: {one.about}." for one in scenarios), reading=READING, required=REQUIRED,
    )


def goodput_row(one: Scenario, baselines: Sequence[str], rate: float, runs: Runs) -> str:
    """Everybody's goodput in a scenario, and ours over the oracle's on the seed that both ran."""
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
    """After each lasting change: the periods until each parameter of the pace stays put, and the swing afterwards."""
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


PAGE = """# While things change

Made by `{command}`. Goodput in requests/s: of the requests between 10 % and 95 % of
the arrival order, those that met both targets, TTFT ≤ 3 s and 80 ms per further token on average. Profile
`a100-llama2-7b`, vLLM's real scheduler with asynchronous scheduling, 360 virtual seconds; one seed, and where a cell
has a range, mean and range over three. Capacity is the fluid bound.

{about}

`fluid` has the targets and nothing else; its controller starts from the profile's law and a guess of lengths and
re-solves every 5 s. "Best static" is an oracle: the best single setting for that very run, of a grid of caps (around
the requests in service of each workload of the scenario, and between them), token budgets (512 and 1 024) and, for the
best of these, times after which clients leave (1, 2, 2.5 s) and caps 6 % beside it; "of 9" says how many of
these settings were run. Required: `fluid` over it at least {required:.2f}.

| scenario | rate /s | {baselines} | best static | fluid / static | fluid: preemptions |
{ruler}
{rows}

## How fast it settles

Passes of the controller (5 s each) after a lasting change until a parameter of the pace in force stays within 5 % (a
queue: within one request) of what it is in the end, and the largest change from pass to pass afterwards.

| scenario | change at | iteration time | prompt flow | queue length | all | swing afterwards |
|---|---|---|---|---|---|---|
{settling}

## What it says

{reading}
"""

READING = """\
- A step of the rate, a diurnal sine, bursts and on-off arrivals leave the workload as it is, and with it the best cap.
  There the oracle is near the fluid bound most of the time, and so is `fluid`: **they are level within what chance
  decides (3 %), and the required 1.10 is out of reach** for whoever serves in the order of arrival.
- A change of the mix is where a single setting cannot follow, and a replica that slows down is where no setting knows.
  Nobody can save those who were in service when it did; for the others the law is scaled within one pass.
- The pace settles within a pass or two of a step, a shift of the mix and a change of speed. Where a trace replaces
  another, whose answers are far longer, it follows as their ends become known, in 13 and 17 passes; what it costs is
  small, since the policy looks at the state anyway. Nothing cycles: after settling no parameter moves by more than 4 %
  from pass to pass."""
