"""Nested WAIT's memory against the number of segments, the paper's segment-design figures: part of theory.py's page."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from theory_fit import table

from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.profiles import load_profile
from scheduler.model.wait_thresholds import SegmentChain, buffer_exponent
from scheduler.model.workload import Lengths
from simulator.workload.config import WorkloadConfig
from simulator.workload.requests import open_workload

LONGEST_TOKENS, MARGIN, SLACK = 500, 0.05, 0.05
COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 25, 50)
# (arrivals per second, T in seconds, δ): the panels of the paper's three figures.
PANELS = (
    (50, 200.0, 1e-1), (50, 200.0, 1e-5), (500, 200.0, 1e-1), (500, 200.0, 1e-5), (50, 20.0, 1e-3), (50, 2000.0, 1e-3),
)  # fmt: skip
LAW_RPS = 50
"""This profile carries about 80 requests/s. For 500 arrivals its speeds are scaled with the arrivals, as ζ does."""


def measure_segments() -> list[dict[str, Any]]:
    """The three terms of the memory bound by number of segments, thresholds real numbers, for every panel."""
    time_model = load_profile("a100-llama2-7b-paper").time_model
    lengths = open_workload(WorkloadConfig(lengths="lmsys", requests=1, rate_rps=1.0)).mix().merged().lengths
    panels = []
    for rate_rps, horizon_s, delta in PANELS:
        speed = rate_rps / LAW_RPS
        scaled = time_model.faster(speed)
        points = [terms(lengths, scaled, rate_rps, horizon_s, delta, count) for count in COUNTS]
        found = [point for point in points if point]
        panels.append({"rate_rps": rate_rps, "horizon_s": horizon_s, "delta": delta, "points": found})
    return panels


def terms(
    lengths: Lengths, time_model: IterationTimeModel, rate_rps: float, horizon_s: float, delta: float, count: int
) -> dict[str, float] | None:
    """M^π, the boundary queues' certain and their random part, in tokens; None when no n keeps up.

    `count` segments of equal width, n_k/n_(k−1) = min(p_k + 0.05, 0.99), and n_1 a little above what keeps up.
    """
    boundaries = tuple(round(LONGEST_TOKENS * k / count) for k in range(1, count + 1))
    chain = SegmentChain(boundaries, lengths, MARGIN)
    relative = np.cumprod([1.0, *chain.ratios])
    kv_load = rate_rps * time_model.d1_s_per_kv_token * float(chain.stage_kv_tokens @ relative)
    if kv_load >= 1:
        return None
    n = (1 + SLACK) * rate_rps * time_model.d0_s / (1 - kv_load) * relative
    queue_log = math.log(count * (1 + horizon_s / time_model.d0_s) / delta)
    roots = [buffer_exponent(p, before, after) for p, (before, after) in zip(chain.survival, pairwise(n), strict=True)]
    return {
        "segments": count, "base": float(chain.stage_kv_tokens @ n),
        "certain": float(chain.queued_kv_tokens[1:] @ n[1:]),
        "random": float(sum(kv * queue_log / root for kv, root in zip(chain.queued_kv_tokens[1:], roots, strict=True))),
    }  # fmt: skip


def draw_segments(figure: Figure, panels: list[dict[str, Any]]) -> None:
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        points = panel["points"]
        counts = [p["segments"] for p in points]
        for key, label in (("base", "M$^π$"), ("certain", "Σ n$_k$(l + r)"), ("random", "log term")):
            axes.plot(counts, [p[key] for p in points], "o-", ms=2, lw=1, label=label)
        axes.plot(counts, [total(p) for p in points], "k.-", ms=4, lw=1, label="total")
        axes.set(yscale="log", xlabel="segments L")
        axes.set_title(f"{panel['rate_rps']} /s, T = {panel['horizon_s']:g}\nδ = {panel['delta']:g}", fontsize=8)
    figure.axes[0].set_ylabel("tokens")
    figure.axes[0].legend(fontsize=6)


def total(point: dict[str, float]) -> float:
    return point["base"] + point["certain"] + point["random"]


def segments_text(panels: list[dict[str, Any]]) -> str:
    """The section of the page."""
    counts = [p["segments"] for p in panels[0]["points"]]
    cells, best = [], []
    for panel in panels:
        by_count = {p["segments"]: p for p in panel["points"]}
        best.append(min(panel["points"], key=total))
        name = f"{panel['rate_rps']} /s, T = {panel['horizon_s']:g} s, δ = {panel['delta']:g}"
        cells.append((name, *(f"{total(by_count[c]):,.0f}" for c in counts), f"{best[-1]['segments']:.0f}"))
    bases = [(p["segments"], p["base"]) for p in panels[0]["points"]]
    dominated = [p for panel in panels for p in panel["points"] if p["base"] < p["certain"] + p["random"]]
    ends = [(panel["points"][0], min(panel["points"], key=total), panel["points"][-1]) for panel in panels]
    u_shaped = all(total(low) < total(first) and total(low) < total(last) for first, low, last in ends)
    return SEGMENTS.format(
        table=table(("total memory, tokens, with L =", *map(str, counts), "least at L ="), cells),
        first=counts[0], missing=", ".join(str(c) for c in COUNTS if c not in counts) or "none",
        shape="U-shaped in L in every panel" if u_shaped else "not U-shaped in every panel",
        base_from=f"{bases[0][1]:,.0f}", base_to=f"{min(b for _, b in bases):,.0f}",
        base_at=f"{min(bases, key=lambda pair: pair[1])[0]:.0f}",
        least=f"{min(p['segments'] for p in best):.0f}", most=f"{max(p['segments'] for p in best):.0f}",
        dominated=(
            "M^π is the largest term everywhere, as in the paper" if not dominated
            else "M^π is not the largest term everywhere: with many segments (L ≥ "
            f"{min(p['segments'] for p in dominated):.0f}) the boundary queues' room exceeds it"
        ),
    )  # fmt: skip


SEGMENTS = """\
## Memory against the number of segments

The paper's segment-design theorem allows any L ≤ m segments, and its three figures plot the bound's three terms against
L. Here: lengths of the workload `lmsys` up to 500 tokens, segments of equal width, n_k/n_(k−1) = min(p_k + 0.05, 0.99),
n_1 5 % above what keeps up, thresholds as real numbers, iteration times of `a100-llama2-7b-paper`. The paper does not
say which its figures have; at 500 arrivals a second those of its other experiments are overloaded 5 to 6 times, so
arrivals and speeds are scaled together there, as its ζ does, and only the logarithm changes.

![Memory against the number of segments](figures/theory-segments.svg)

COMMAND

{table}

- The total is {shape}: least at L = {least} to {most}. Few segments count stages that few requests reach
  (M^π = {base_from} at L = {first}, {base_to} at L = {base_at}), many need room for many boundary queues, and their
  ratios p_k + 0.05 add up. Without thresholds that keep up: L = {missing}.
- {dominated}.
- δ and T enter as a logarithm: compare the panels.
"""
