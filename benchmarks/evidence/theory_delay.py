"""Latency and time to first token in heavy traffic, as theory.py measures them: the section of its page."""

from __future__ import annotations

import math
from typing import Any

from theory_fit import table


def square_root_bound(rate_rps: float, per_iteration: float, horizon_s: float) -> float:
    """Mean wait in seconds of the paper's lower bound at C = M*, for a long horizon in service-normalised seconds.

    The entry queue is at least the reflected walk Q ← (Q + Poisson(n) − n)⁺, one step an iteration of n/λ seconds. Its
    mean after b steps tends to √(2nb/π), so its time average over B steps to two thirds of √(2nB/π).
    """
    steps = horizon_s * rate_rps / per_iteration
    return 2 / 3 * math.sqrt(2 * per_iteration * steps / math.pi) / rate_rps


def delay_text(curves: list[dict[str, Any]]) -> str:
    """The section: exponents of latency and TTFT beside the theorems', and the lower bound."""
    slopes = table(
        ("policy", "latency: slope", "± s.e.", "TTFT: slope", "± s.e.", "theorem", "gap: slope", "theorem"),
        [
            (c["label"], *(f"{c[f'{key}_slope'][i]:.3f}" for key in ("latency", "ttft") for i in (0, 1)),
             c["delay_theory"], f"{c['slope']:.3f}", f"{c['theory']:g}" if c["theory"] is not None else "–")
            for c in curves
        ],
    )  # fmt: skip
    scales = max((c["scales"] for c in curves), key=len)
    delays = table(
        ("service-normalised latency, s, at ζ =", *map(str, scales)),
        [(c["label"], *(f"{x:.3g}" for x in c["latency"]), *("" for _ in scales[len(c["scales"]) :])) for c in curves],
    )
    at_boundary = [c["latency_slope"][0] for c in curves if c["label"].startswith("WAIT at the boundary")]
    boundary = next(c for c in curves if c["label"].startswith("WAIT at the boundary"))
    bounds = [square_root_bound(4.0, 4.0, 100.0 * scale) for scale in boundary["scales"]]
    bound = table(
        ("one type, C = M* = 12, at ζ =", *map(str, boundary["scales"])),
        [("lower bound of the wait, s", *(f"{b:.3g}" for b in bounds)),
         ("WAIT, n = 4: time before the prefill, s", *(f"{w:.3g}" for w in boundary["wait"])),
         ("ratio", *(f"{w / b:.2f}" for w, b in zip(boundary["wait"], bounds, strict=True)))],
    )  # fmt: skip
    stable = [c for c in curves if c["delay_theory"] == "O(1)"]
    steepest = max(abs(c[f"{key}_slope"][0]) for c in stable for key in ("latency", "ttft"))
    nested = [c for c in curves if c["label"].startswith("Nested")]
    return DELAY.format(
        slopes=slopes, delays=delays, bound=bound, steepest=f"{steepest:.3f}", rows=curves[0]["rows"],
        nested=" and ".join(f"{c['slope']:.2f}" for c in nested),
        limit=f"{next(c for c in curves if c['label'].startswith('Entry'))['latency_slope'][0]:.2f}",
        boundary=" and ".join(f"{slope:.2f}" for slope in at_boundary),
        last=f"{boundary['wait'][-1] / bounds[-1]:.2f}",
    )


DELAY = """\
## Latency and time to first token

The same {rows} runs. Delays are service-normalised as in the theorems (calendar time × ζ): the mean over arrivals of
the time in the system up to T, by Little's law, and of the time before the first output token (prefill yields none in
this model). "Nested WAIT" has the thresholds of the next section and memory without limit, as in its theorem.

COMMAND

{slopes}

{delays}

- With slack, and for Nested WAIT, delays do not grow: the largest slope in size is {steepest}. Nested WAIT's throughput
  gap falls with slopes of {nested}; the theorem says O(1/(ζT)).
- At the boundary the slopes of latency are {boundary} where the theorem has at most 1/2: √(ζT) on top of a constant
  that small ζ still show, the fill of the stages and the wait for the first group.
- An entry limit of the same size without any waiting has a latency slope of {limit} at the boundary too: the
  limit is what keeps up, not the waiting. The authors' own ablation says the same of p512d20.

No policy with a vanishing gap can do better at C = M* (the paper's square-root proposition). Its proof compares the
entry queue with a walk that has no drift; the mean wait of that walk beside the measured time before the prefill:

{bound}

The ratio falls towards 1 as the constant matters less ({last} at the largest ζ): WAIT meets the bound.
"""
