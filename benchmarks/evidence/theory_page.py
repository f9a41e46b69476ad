"""How the numbers of theory.py are shown: four figures and one page."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from conclusions import theory
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from page_tables import with_conclusion
from theory_delay import delay_text
from theory_fit import table
from theory_limits import limits_text
from theory_segments import draw_segments, segments_text
from theory_varying import varying_text

COLOURS = ("#D55E00", "#E69F00", "#0072B2", "#009E73")
STYLE: list[Any] = [
    "default",
    {
        "svg.hashsalt": "headrace", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8,
        "savefig.dpi": 110,
    },
]


def write_figures(numbers: dict[str, Any], folder: Path) -> None:
    """theory-*.png and theory-*.svg in `folder`; the same numbers give the same SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    draws: dict[str, Callable[[Figure, Any], None]] = {
        "gap": draw_gap, "overflow": draw_overflow, "memory": draw_memory, "worked_case": draw_worked_case,
        "segments": draw_segments,
    }  # fmt: skip
    with matplotlib.style.context(STYLE):
        for name, draw in ((name, draw) for name, draw in draws.items() if name in numbers):
            figure = Figure(figsize=(8.5, 3.4), layout="constrained")
            draw(figure, numbers[name])
            stem = folder / f"theory-{name.replace('_', '-')}"
            figure.savefig(stem.with_suffix(".png"))
            figure.set_layout_engine("none")  # keeps the layout just found; searching takes longer than drawing
            figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def draw_gap(figure: Figure, numbers: list[dict[str, Any]]) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for axes, types, title in zip(panels, (1, 2), ("one type", "two types"), strict=True):
        shown = [c for c in numbers if c["types"] == types and c["theory"] is not None and not c.get("panel")]
        for curve, colour in zip(shown, COLOURS[-len(shown) :], strict=True):
            label = f"{curve['label']}: {curve['slope']:.2f} (theory {curve['theory']:g})"
            axes.errorbar(curve["scales"], curve["gaps"], 2 * np.array(curve["gap_errors"]), fmt="o-", ms=3,
                          color=colour, label=label)  # fmt: skip
            first = curve["scales"].index(curve["fit_from_scale"])
            guide = (np.array(curve["scales"]) / curve["fit_from_scale"]) ** curve["theory"] * curve["gaps"][first]
            axes.plot(curve["scales"], guide, ":", color=colour, lw=0.8)
        axes.set(xscale="log", yscale="log", xlabel="ζ", title=title, ylim=(2e-5, 20))
        axes.legend(loc="upper right")
    panels[0].set_ylabel("throughput gap / fluid throughput")


def draw_overflow(figure: Figure, numbers: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(row["case"] for row in numbers))
    panels = figure.subplots(1, len(names), sharey=True)
    for axes, name in zip(panels, names, strict=True):
        for row, colour in zip((r for r in numbers if r["case"] == name), COLOURS[::2], strict=True):
            beyond = row["horizons"] - np.cumsum(row["peak_horizons"])
            values = np.array([0.0, *row["peak_above_m_pi_tokens"]])
            frequency = np.array([row["overflows_without_buffer"], *beyond]) / row["horizons"]
            axes.step(values, np.where(frequency > 0, frequency, np.nan), where="post", color=colour, lw=1,
                      label=f"simulated, run for δ = {row['delta']:g}")  # fmt: skip
            axes.plot(row["buffer_tokens"], row["delta"], "s", color=colour,
                      label=f"theory: buffer for δ = {row['delta']:g}")  # fmt: skip
            axes.axvline(row["buffer_tokens"], color=colour, ls=":", lw=0.8)
        axes.set(yscale="log", xlabel="room above M$^π$, tokens", title=name, xlim=(0, None))
        axes.legend(loc="lower left")
    panels[0].set_ylabel("horizons with an overflow")


def draw_memory(figure: Figure, numbers: dict[str, Any]) -> None:
    axes = figure.subplots()
    curve = numbers["curve"]
    axes.plot(curve["rate_rps"], curve["memory_tokens"], color=COLOURS[2], label="M*(λ), computed")
    published = [(row["rate_rps"], row["published"]) for row in numbers["rows"]]
    axes.plot(*zip(*published, strict=True), "o", color=COLOURS[0], label="published")
    axes.axhline(numbers["capacity_tokens"], color="black", lw=0.8, ls="--", label="C")
    axes.axvline(numbers["crossing_rps"], color="black", lw=0.8, ls=":", label="M* reaches C")
    axes.set(xlabel="arrival rate λ, requests/s", ylabel="equilibrium memory, tokens", yscale="log")
    axes.legend()


def draw_worked_case(figure: Figure, numbers: list[dict[str, Any]]) -> None:
    panels: tuple[Axes, Axes] = figure.subplots(1, 2)
    for axes, key, label in zip(panels, ("completions", "waiting"), ("completions", "prompts waiting"), strict=True):
        for row, colour in zip(numbers, COLOURS[::2], strict=True):
            axes.plot(range(1, len(row[key]) + 1), row[key], "o-", ms=3, color=colour, label=row["label"])
        axes.set(xlabel="iteration", ylabel=label, ylim=(-0.5, None))
    panels[1].legend(loc="upper left")


def page(numbers: dict[str, Any], command: str) -> str:
    """The Markdown page; `command` is what wrote it."""
    sections: list[tuple[str, Callable[[Any], str]]] = [
        ("gap", gap_text), ("delay", delay_text), ("limits", limits_text), ("varying", varying_text),
        ("overflow", overflow_text), ("segments", segments_text), ("memory", memory_text),
        ("worked_case", worked_case_text),
    ]  # fmt: skip
    if "latency" in numbers["gap"][0]:  # an older theory.json has the gaps alone
        numbers = numbers | {"delay": numbers["gap"]}
    parts = [PREFACE, *(text(numbers[name]) for name, text in sections if name in numbers), DIFFERENCES]
    return with_conclusion("\n".join(parts).replace("COMMAND", f"    {command}"), theory)


def gap_text(curves: list[dict[str, Any]]) -> str:
    curves = [c for c in curves if c["theory"] is not None and not c.get("panel")]
    slopes = table(
        ("curve", "slope", "± s.e.", "theory", "fitted from ζ", "restarts per completion"),
        [
            (c["label"], f"{c['slope']:.3f}", f"{c['slope_error']:.3f}", f"{c['theory']:g}", f"{c['fit_from_scale']}",
             f"{c['restarts_per_completion']:.2f}")
            for c in curves
        ],
    )  # fmt: skip
    scales = max((c["scales"] for c in curves), key=len)
    gaps = table(
        ("gap at ζ =", *map(str, scales)),
        [(c["label"], *(f"{g:.2g}" for g in c["gaps"]), *("" for _ in scales[len(c["gaps"]) :])) for c in curves],
    )
    boundary = next(c for c in curves if c["theory"] == -0.5)
    # One type: arrivals per iteration are Poisson(n), n leave, and such a walk, reflected at 0, grows as √(2nN/π).
    arrivals = 400 * boundary["scales"][-1]
    asymptote, last = math.sqrt(2 / (math.pi * arrivals)), boundary["gaps"][-1]
    return GAP.format(
        slopes=slopes, gaps=gaps, rows=curves[0]["rows"], asymptote=f"{asymptote:.3g}", last=f"{last:.3g}",
        scale=boundary["scales"][-1], error=f"{boundary['gap_errors'][-1]:.1g}",
    )  # fmt: skip


def overflow_text(rows: list[dict[str, Any]]) -> str:
    cells = []
    for r in rows:
        low, high = r["interval_95"]
        frequency = r["overflows"] / r["horizons"]
        verdict = "yes" if high <= r["delta"] else ("no" if low > r["delta"] else "undecided")
        cells.append(
            (r["case"], f"{r['delta']:g}", f"{r['memory_tokens']:.0f} + {r['buffer_tokens']:.1f}",
             f"{r['overflows']} of {r['horizons']}", f"{frequency:.2g}", f"{low:.2g} – {high:.2g}", verdict,
             f"{r['overflows_without_buffer'] / r['horizons']:.4g}", f"{r['buffer_needed_tokens']:.0f}")
        )  # fmt: skip
    header = ("lengths", "δ", "M^π + buffer", "overflows", "frequency", "95 % interval", "≤ δ", "without buffer",
              "room that δ needed")  # fmt: skip
    return OVERFLOW.format(
        cases="\n".join(
            f"- {r['case']}: boundaries {list(r['boundaries'])}, n = {list(r['n'])}, "
            f"p = {[round(p, 3) for p in r['survival']]}, θ = {[round(t, 3) for t in r['theta']]}, "
            f"{r['iterations']:.0f} iterations a horizon"
            for r in rows[::2]
        ),
        table=table(header, cells),
    )


def memory_text(memory: dict[str, Any]) -> str:
    cells = [(f"{r['rate_rps']}", f"{r['published']:,}", f"{r['computed']:,.1f}") for r in memory["rows"]]
    cells.append(("M* = C at", f"{memory['published_crossing_rps']} /s", f"{memory['crossing_rps']:.4f} /s"))
    exact = all(round(r["computed"]) == r["published"] for r in memory["rows"])
    return MEMORY.format(
        table=table(("λ, requests/s", "published M*, tokens", "computed"), cells),
        capacity=f"{memory['capacity_tokens']:,}", d0=f"{memory['d0_ms']:.4f}", d1=f"{memory['d1_us']:.4f}",
        weight=f"{memory['mean_w']:,.2f}",
        verdict="Every row is the published one to the token." if exact else "Not every row is the published one.",
    )


def worked_case_text(rows: list[dict[str, Any]]) -> str:
    shown = 14
    cells = [
        (r["label"], what, *(str(v) for v in r[what][:shown])) for r in rows for what in ("completions", "evictions")
    ]
    means = [
        f"- {r['label']}: {np.mean(r['completions'][:6]):.2f} over the first six iterations, "
        f"{np.mean(r['completions'][8:]):.2f} from the ninth on"
        for r in rows
    ]
    return WORKED_CASE.format(
        table=table(("policy", "iteration", *map(str, range(1, shown + 1))), cells), means="\n".join(means)
    )


PREFACE = """\
# The theory, checked on its own model

<!-- conclusion: begin -->
<!-- conclusion: end -->

![Throughput gap against ζ, log-log](figures/theory-gap.svg)

Claims of arXiv 2504.11320 beside simulations of the model in which it proves them (`simulator/paper_model.py`): an
iteration takes d0 + d1·Σ(l + s), arrivals are Poisson, memory beyond C evicts last in, first out, and an
evicted prompt restarts. Nothing here is a claim about vLLM or about a GPU. Thresholds, buffers and equilibria are those
that Headrace computes (`scheduler/model/fluid.py`, `scheduler/model/wait_thresholds.py`). Every figure and number on
this page, and [theory.json](theory.json), come from one command, which takes two to four minutes on one core:

COMMAND
"""

GAP = """\
## Throughput gap in heavy traffic

Arrivals and speeds × ζ (rates × ζ, d0 and d1 ÷ ζ), horizon T = 100 s, starting empty, thresholds fixed. The gap is the
fluid throughput less the achieved one (output tokens of completed prompts), divided by the fluid throughput. The figure
above shows it.

COMMAND

One type: l = l' = 1, λ = 4 /s, d0 = 1/4 s, d1 = 1/16 s per token, so that ΔT* = 1 s and M* = 12 tokens. Two types:
(l, l') = (1, 1) and (2, 3), λ = 4 and 2 /s, d0 = 3/8 s, d1 = 1/64 s per token, so that ΔT* = 1 s and M* = 40 tokens.
"At the boundary": ΔT(n) = n_j/λ_j for every type and C = M(n) = M*. "With slack": ΔT(n) < n_j/λ_j, C = M(n). Means over
{rows} runs, bars of two standard errors; dotted lines have the theory's slope.

{slopes}

{gaps}

The theory's exponents are upper bounds for WAIT (O((ζT)^-1/2), O(1/(ζT)) with slack) and a lower one for FCFS (Ω(1)).

- WAIT at the boundary is still a little steeper than −1/2 over this range, because the gap has a second term: filling
  the stages, and waiting for the first n_j, costs a constant number of prompts, O(1/(ζT)), which at ζ = 16 is not yet
  negligible. With one type the leading term can be computed, √(2/(π λ ζT)), the growth of a driftless queue:
  {asymptote} at ζ = {scale}, where {last} ± {error} is measured.
- WAIT with slack has no queue that grows: its gap is that start-up cost plus a queue that does not depend on ζ.
- FCFS loses a constant fraction at C = M*. Its slope is slightly above 0, not below: on a short horizon it has not yet
  built the queue that keeps the evict-and-restart cycle going. With the 15 tokens that WAIT has with slack it loses
  less, but still a constant fraction.
- To reduce the noise, the gap's mean is estimated from the output tokens still owed at T. That is the same mean, since
  the expected arrivals are exactly λT, without the arrivals' own fluctuation.
"""

OVERFLOW = """\
## How often Nested WAIT overflows

`nested_wait_thresholds` gives n_k, M^π and the safety buffer for δ over a horizon of 200 s; capacity is M^π + buffer.
An overflow is a horizon in which memory exceeds that at least once, starting empty. Prompt length 4, λ = 20 /s,
d0 = 1/4 s, d1 = 1/4800 s per token; outputs of 2 or 8 tokens (30, 70 %), and of 2, 4 or 8 (30, 30, 40 %).

{cases}

![Overflow frequency against the room above M^π](figures/theory-overflow.svg)

COMMAND

{table}

Intervals are Clopper–Pearson. "Without buffer" is C = M^π. "Room that δ needed" is the smallest buffer, in tokens, with
which no more than a fraction δ of these horizons overflows.

- The bound holds, with room to spare. It adds up over 1 + T/d0 iterations, of which fewer happen since they take longer
  than d0; over m segments, of which the first has no boundary queue; it uses an exponential bound without the
  prefactor below 1; and it has room for all boundary queues at their longest at once, which makes it looser with
  three segments than with two.
- Without a buffer practically every horizon overflows: M^π has room for n_k prompts in a boundary queue, and the queue
  is longer than that now and then. So some buffer is needed, and its size grows only with the logarithm of T/δ.
- A held prompt counts l + s tokens with s its next stage, l'_(k−1) + 1 at a boundary, one more than the buffer's
  formula gives it. The bound holds with that too.
"""

MEMORY = """\
## Equilibrium memory beside the published figures

d0 = {d0} ms, d1 = {d1} µs per token (profile `a100-llama2-7b-paper`) and the requests' mean weight E[w] = {weight}
KV-token-iterations are those of the authors' repository (`outputs/fluid_memory/lmsys_paper_trace_mstar.csv`), with
C = {capacity} tokens. Nothing is fitted here.

![Equilibrium memory against the arrival rate](figures/theory-memory.svg)

COMMAND

{table}

{verdict}
"""

WORKED_CASE = """\
## FCFS at C = M*, iteration by iteration

l = l' = 1, C = 12, exactly 4 arrivals during every iteration, from 6 waiting and 3 decoding. Balance is 4 in prefill
and 4 in decode, 4·1 + 4·2 = 12 tokens. FCFS admits all that fit, and their memory doubles one iteration later.

![Completions and waiting prompts by iteration](figures/theory-worked-case.svg)

COMMAND

{table}

Completions per iteration:

{means}

FCFS fills all 12 tokens with prefills, evicts 6 of them when they grow, completes the other 6 and starts over: 6
completions in two iterations, while its queue grows by one prompt an iteration.
"""

DIFFERENCES = """\
## Where the code differs from the paper's text, without harm

- **Boundary stage.** Algorithm 2 gives each boundary an index of its own in segment k, so that a crossing costs an
  iteration without a token. The paper's ΔT(n), δ_k and M^π leave that stage out. Here a boundary is the segment's first
  stage, l'_(k−1) + 1, which is the reading that agrees with those formulae.
- **l' + 1 iterations.** The paper's prefill yields no token. An engine's prefill yields the first one: l' iterations
  and l + l' KV-token-iterations less than w. The fluid model keeps w, and so counts a little too much: 5 % of d1's work
  at p512d20, 0.2 % at p512d1000.
- **Mean prompt.** With prompts of several lengths, the paper's sufficient condition puts the longest prompt of a
  segment for l. `nested_wait_thresholds` takes the mean prompt of the requests that reach the segment: right on
  average, but then δ is an estimate and no longer a guarantee.
- **FCFS.** Admits what fits and evicts on growth; the paper's example evicts running requests to admit new ones.
- **A held prompt at a boundary** counts its next stage, one token more than the buffer's formula gives it.
"""
