"""The paper's tables, repeated with vLLM's real scheduler in virtual time: docs/evidence/paper-tables.md.

    python benchmarks/evidence/paper_tables.py [--out docs/evidence] [--runs runs/paper] [--quick]

Runs that are in --runs already are kept, so an interrupted command goes on where it stopped. --quick is for tests of
this script and too small to conclude anything.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from grids import Cells, Grid, arguments, best, by, fluid_of, mean_of, run_grids, with_spread

from simulator.sweep import PointResult

COMMAND = "python benchmarks/evidence/paper_tables.py"
PROFILE = "a100-llama2-7b"
BY_CAP = ("wait", "nested-wait")
CONTENDERS = ("vllm-v0", "sarathi", "vllm", "wait", "nested-wait")


@dataclass(frozen=True)
class Table:
    """One workload of the paper. published: mean latency in seconds by (rate, contender)."""

    lengths: str
    rates: tuple[float, ...]
    requests: int
    caps: tuple[int, ...]
    published: dict[tuple[float, str], str]

    @property
    def name(self) -> str:
        """For folders."""
        return self.lengths.replace(":", "_").replace("+", "_")


TABLES = (
    Table(
        "p512d20", (19, 22, 23), 3000, (16, 21, 24, 32, 48),
        {(22, "vllm-v0"): "18.23", (22, "sarathi"): "1.85", (22, "wait"): "1.03",
         (23, "vllm-v0"): "26.78", (23, "sarathi"): "5.08", (23, "wait"): "1.29"},
    ),
    Table(
        "0.7:p512d20+0.3:p512d50", (18, 21, 22, 23), 3000, (24, 32, 40, 64),
        {(22, "vllm-v0"): "56.70", (22, "sarathi"): "4.06", (22, "nested-wait"): "2.36",
         (23, "vllm-v0"): "80.25", (23, "sarathi"): "8.41", (23, "nested-wait"): "5.66"},
    ),
    Table(
        "p512d1000", (1.4, 1.6, 4.0, 4.5), 400, (96, 112, 128),
        {(4.0, "sarathi"): "30.2 (2.88 % restarts)", (4.0, "wait"): "26.4 (0 %)",
         (4.5, "vllm-v0"): "53.8", (4.5, "sarathi"): "41.7", (4.5, "wait"): "32.3"},
    ),
)


def main() -> None:
    args = arguments(__doc__, "runs/paper").parse_args()
    seeds, share = ([1], 0.02) if args.quick else ([1, 2, 3], 1.0)
    grids = {name: grid for table in TABLES for name, grid in grids_of(table, seeds, share).items()}
    results = run_grids(args.runs, grids)
    sections = [section(table, grids, results) for table in TABLES]
    args.out.mkdir(parents=True, exist_ok=True)
    long_runs = by(results[TABLES[-1].name], "rate_rps", "policy")[4.0, "wait"]
    text = PAGE.format(
        command=COMMAND, sections="\n".join(sections), long_requests=long_runs[0]["requests"],
        wait_preemptions=mean_of(long_runs, "preemptions"),
    )
    (args.out / "paper-tables.md").write_text(text)


def grids_of(table: Table, seeds: list[int], share: float) -> dict[str, Grid]:
    """The contenders at every rate, and WAIT under a few caps."""
    base = {"lengths": table.lengths, "requests": max(20, round(table.requests * share)), "profile": PROFILE}
    base["solve_once"] = True
    rates: list[Any] = list(table.rates)
    return {
        table.name: Grid(base, {"policy": list(CONTENDERS), "rate_rps": rates}, seeds),
        f"{table.name}-caps": Grid(
            base | {"counts": "by_cap"}, {"policy": list(BY_CAP), "cap": list(table.caps), "rate_rps": rates}, seeds[:1]
        ),
    }


def section(table: Table, grids: dict[str, Grid], results: dict[str, list[PointResult]]) -> str:
    """One workload's table, in Markdown."""
    base = grids[table.name].base
    plain = by(results[table.name], "rate_rps", "policy")
    capped = by(results[f"{table.name}-caps"], "policy", "rate_rps", "cap")
    rows = [row(table, plain, capped, rate) for rate in table.rates]
    head = "| rate /s | " + " | ".join((*CONTENDERS, *(f"{policy} by cap" for policy in BY_CAP))) + " |"
    ruler = "|---" * (len(CONTENDERS) + len(BY_CAP) + 1) + "|"
    title = f"## {table.lengths}, {base['requests']} requests"
    return "\n".join([title, "", capacity_line(base), "", head, ruler, *rows, ""])


def row(table: Table, plain: Cells, capped: Cells, rate: float) -> str:
    cells = []
    for contender in CONTENDERS:
        summaries = plain[rate, contender]
        text = with_spread(summaries, "latency_mean_s")
        preempted = mean_of(summaries, "preemptions")
        if preempted:
            text += f", {preempted:.0f} preemptions"
        if (rate, contender) in table.published:
            text += f"; published {table.published[rate, contender]}"
        cells.append(text)
    for policy in BY_CAP:
        tried = {cell: summaries for cell, summaries in capped.items() if cell[:2] == (policy, rate)}
        chosen = best(tried, "latency_mean_s")
        cells.append(f"{mean_of(tried[chosen], 'latency_mean_s'):.2f} at {chosen[-1]}")
    return f"| {rate:g} | " + " | ".join(cells) + " |"


def capacity_line(base: dict[str, Any]) -> str:
    """What the fluid model says of the workload under this law, and under the paper's own two-term law."""
    ours, published = (capacity(base["lengths"], profile) for profile in (PROFILE, "a100-llama2-7b-paper"))
    return (
        f"Fluid capacity: {ours} under the law used here, "
        f"{published} under the paper's own two-term law, in which prefill is free."
    )


def capacity(lengths: str, profile: str) -> str:
    fluid = fluid_of(lengths, profile)
    return f"{fluid.critical_rate_scale:.2f} /s ({fluid.limit})"


PAGE = """# The paper's tables with today's scheduler

Made by `{command}`. Mean end-to-end latency in seconds of the requests that
arrived in the central window (30 % to 90 % of the arrivals); mean of three seeds with smallest and largest. vLLM 0.29's
own V1 scheduler and block manager in virtual time, law and memory of the profile `a100-llama2-7b` (137 000 tokens).
`vllm-v0` and `sarathi` are the paper's baselines as V1 runs them; `vllm` is V1 as it comes (2 048 tokens an iteration);
`wait` and `nested-wait` have the thresholds that the shipped solver finds, and the cap from memory. "By cap" is the
rule of the paper's experiments, counts that follow from a cap on requests in service: the best cap of a small grid, one
seed. Published values: arXiv 2504.11320 (Vidur simulator, one A100 80GB, Llama-2-7B).

{sections}
## What agrees, what does not, and why

- **Order.** On p512d20 the order is the paper's: prefill first is the slowest, then chunked prefill, then WAIT. WAIT's
  one request a stage lets one prompt into each iteration, which is what a budget of about one prompt an iteration does
  too: Sarathi is close behind, and ahead of V1's 2 048-token default. On the two-type mix Sarathi wins below capacity,
  and our thresholds win only close to it: whole requests per stage are too coarse there, and at 21 /s and more the
  solver of Nested WAIT finds none, opens the gates and leaves plain vLLM's numbers. On p512d1000 under memory pressure
  the cap is what helps: it takes away two thirds of the preemptions and 8 % of the mean latency.
- **Size.** Ours are smaller where the baselines suffer. The capacity here is 25.2 and 23.5 requests/s; in the paper the
  prefill-first baseline is stable up to 19 and 18 /s only and grows without bound beyond. Two differences account for
  it: the time law (Vidur's prices prefill and attention kernel by kernel; ours is linear, from published linear-layer
  times), and preemption, which in V1 recomputes what a request had and in the paper starts it over.
- **p512d1000.** 4.0 and 4.5 requests/s are 2.3 and 2.6 times the fluid capacity under the law used here, and twice that
  under the paper's own two-term law, so the published means fit short runs that end before the queue has grown. Our
  means grow with the number of requests ({long_requests} here) and compare in order only. 1.4 and 1.6 /s are within
  capacity.
- **The cap from memory** assumes that requests of all ages are in service. Here all answers have the same length and
  the first hundred begin together, so they are long together: the cap still lets {wait_preemptions:.0f} preemptions
  happen at 4.0 /s, and the best cap of the grid is smaller.
"""


if __name__ == "__main__":
    main()
