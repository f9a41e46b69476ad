"""What the paper's literal rule costs and buys beside the serving mode: docs/evidence/strict-or-serving.md.

    python benchmarks/evidence/strict_or_serving.py [--out docs/evidence] [--runs runs/strict] [--quick]

Runs that are in --runs already are kept. --quick is for tests of this script and too small to conclude anything.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from conclusions import strict_or_serving
from grids import PROFILE, Cells, Grid, arguments, by, fluid_of, mean_of, run_grids, slug
from page_tables import with_conclusion

from simulator.output.figures import Line, RatePanel, draw_against_rate

COMMAND = "python benchmarks/evidence/strict_or_serving.py"
LOADS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05)
RULES = ("vllm", "serving", "strict")
SEEDS = (1, 2, 3)


class Case(NamedTuple):
    """One policy on one workload. cap: counts follow from it by the rule of the paper's experiments (None: solved)."""

    policy: str
    lengths: str
    requests: int
    cap: int | None = None


CASES = {
    "WAIT, p512d20": Case("wait", "p512d20", 2000),
    "WAIT, 0.7:p512d20+0.3:p512d50": Case("wait", "0.7:p512d20+0.3:p512d50", 2000),
    "Nested WAIT, 0.7:p512d20+0.3:p512d50": Case("nested-wait", "0.7:p512d20+0.3:p512d50", 2000, cap=64),
    "Nested WAIT, lmsys": Case("nested-wait", "lmsys", 3000, cap=400),
}


def main() -> None:
    args = arguments(__doc__, "runs/strict").parse_args()
    loads = LOADS[1::3] if args.quick else LOADS
    capacities = {name: fluid_of(case.lengths, PROFILE).critical_rate_scale for name, case in CASES.items()}
    grids = {
        f"{slug(name)}-{rule}": grid_of(name, rule, loads, capacities[name], 0.03 if args.quick else 1.0)
        for name in CASES for rule in RULES
    }
    results = run_grids(args.runs, grids)
    args.out.mkdir(parents=True, exist_ok=True)
    sections = []
    for name, capacity in capacities.items():
        cells = {rule: by(results[f"{slug(name)}-{rule}"], "rate_rps") for rule in RULES}
        stem = args.out / "figures" / f"strict-{slug(name)}"
        draw(stem, name, cells)
        sections.append(section(name, capacity, loads, cells))
    first = next(iter(CASES))
    text = PAGE.format(command=COMMAND, sections="\n".join(sections), first=first, first_slug=slug(first))
    (args.out / "strict-or-serving.md").write_text(with_conclusion(text, strict_or_serving))


def grid_of(name: str, rule: str, loads: tuple[float, ...], capacity: float, share: float) -> Grid:
    case = CASES[name]
    base: dict[str, Any] = {"lengths": case.lengths, "requests": max(30, round(case.requests * share))}
    base |= {"profile": PROFILE, "policy": "vllm" if rule == "vllm" else case.policy, "solve_once": True}
    base["async_scheduling"] = False  # the paper's iterations: a token is known before the next one is scheduled
    if rule != "vllm":
        base["mode"] = rule
        base |= {"counts": "by_cap", "cap": case.cap} if case.cap else {}
    return Grid(base, {"rate_rps": [round(load * capacity, 2) for load in loads]}, seeds=SEEDS)


def draw(stem: Path, name: str, cells: dict[str, Cells]) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)

    def lines(key: str) -> list[Line]:
        return [line(rule, cells[rule], key) for rule in RULES]

    panels = [
        RatePanel(label, lines(key))
        for label, key in (("mean latency (s)", "latency_mean_s"), ("mean TTFT (s)", "ttft_mean_s"))
    ]
    draw_against_rate(stem, name, panels)


def line(label: str, cells: Cells, key: str) -> Line:
    """A measure against rate, with its range over seeds."""
    values = [[summary[key] for summary in summaries] for summaries in cells.values()]
    rates = np.array([cell[0] for cell in cells])
    mean, low, high = (np.array([f(v) for v in values]) for f in (np.mean, min, max))
    return Line(label, rates, mean, low, high)


def section(name: str, capacity: float, loads: tuple[float, ...], cells: dict[str, Cells]) -> str:
    """One case: latency, TTFT, and requests that are never scheduled, by load."""
    delays = " | ".join(f"{rule}: latency / TTFT" for rule in RULES)
    head = f"| load | rate /s | {delays} | strict: never scheduled |"
    rows = []
    for load, (rate,) in zip(loads, cells["vllm"], strict=True):
        row = [f"{load:g}", f"{rate:g}"]
        for rule in RULES:
            runs = cells[rule][rate,]
            row.append(f"{mean_of(runs, 'latency_mean_s'):.2f} / {mean_of(runs, 'ttft_mean_s'):.2f}")
        row.append(f"{mean_of(cells['strict'][rate,], 'stranded'):.0f}")
        rows.append("| " + " | ".join(row) + " |")
    figure = f"![{name}](figures/strict-{slug(name)}.svg)" if name != next(iter(CASES)) else ""
    title = [f"## {name}", "", f"Fluid capacity {capacity:.2f} requests/s.", ""]
    return "\n".join([*title, head, "|---" * 6 + "|", *rows, "", *([figure, ""] if figure else [])])


PAGE = """# The paper's literal rule beside the serving mode

<!-- conclusion: begin -->
<!-- conclusion: end -->

![{first}](figures/strict-{first_slug}.svg)

Made by `{command}`, tables and figures. Mean end-to-end latency and mean time to
first token, both in seconds, of the requests that arrived in the central window; mean of three seeds; profile
`a100-llama2-7b`; synchronous scheduling in all three columns, as in the paper, so that no token is in flight while the
next iteration is scheduled.

Under the literal (`strict`) rule no request of a type moves while the type's group is incomplete, and requests that are
left when arrivals end are never scheduled. In `serving` mode only admission and the step over a boundary wait, at most
0.25 s each, and an idle engine admits at once. Both run with the same thresholds. WAIT's are those of the shipped
solver for that rate; where the rate cannot be served they are open, and all three columns agree. Nested WAIT's follow
from a cap on running requests, as in the paper's experiments: 64 on the mix, 400 on lmsys lengths.

A request moves one stage only when another group is complete, so under the literal rule the decode stands still and the
first token does not. Requests that are never scheduled are in no average of the strict column, which flatters it. Where
the serving mode wins, the cause is smoothing: groups keep the prompts of one iteration few, so that the decodes beside
them are not slowed. A token budget does that too (see [the paper's experiments](paper-tables.md)).

{sections}"""


if __name__ == "__main__":
    main()
