"""The iteration-time model of Llama-2-7B on an A100, fitted to published iteration times: docs/evidence/a100-law.md.

    python benchmarks/evidence/a100_law.py [--out docs/evidence] [--traces FOLDER] [--write-profile]

--traces is a folder with azure_conv_2023.csv; its row is left out without it. --write-profile writes the profile
`a100-llama2-7b-vidur`. Seconds on one core; no simulation.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from conclusions import a100_law
from numpy.typing import NDArray
from page_tables import with_conclusion
from scipy.optimize import least_squares
from scipy.stats import t as student

from scheduler.model.fluid import solve_fluid
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.profiles import load_profile
from scheduler.model.workload import WorkloadMix
from simulator.workload.config import WorkloadConfig
from simulator.workload.requests import open_workload

COMMAND = "python benchmarks/evidence/a100_law.py"
OLD, NEW = "a100-llama2-7b", "a100-llama2-7b-vidur"
PROFILE_PATH = Path(__file__).parents[2] / "scheduler" / "profiles" / f"{NEW}.json"
KV_BYTES_PER_TOKEN = 524_288
BANDWIDTH_BYTES_PER_S = 2.039e12
"""Of an A100 80GB SXM, as NVIDIA publishes it."""


class Point(NamedTuple):
    """One batch: prompt tokens and decodes in it, KV tokens that it reads (Σ l + s), milliseconds."""

    kind: str
    prefill: int
    decodes: int
    kv: int
    ms: float


def decodes(*rows: tuple[int, int, float]) -> list[Point]:
    return [Point("decodes", 0, *row) for row in rows]


# Vidur's predictions for Llama-2-7B on one A100 80GB, from the repository of the authors of arXiv 2504.11320
# (outputs/fluid_memory). A prefill chunk is counted as reading what has been computed up to its own end, as vLLM does.
POINTS = [
    *decodes(  # long_llama2_a100.affine_samples.csv, all of it
        (1, 762, 9.858), (1, 1012, 9.847), (1, 1262, 9.837), (1, 1512, 9.837),
        (4, 3048, 10.788), (4, 4048, 11.264), (4, 5048, 11.515), (4, 6048, 12.142),
        (8, 6096, 12.349), (8, 8096, 12.967), (8, 10096, 13.844), (8, 12096, 14.828),
        (16, 12192, 14.072), (16, 16192, 15.228), (16, 20192, 16.584), (16, 24192, 18.121),
        (32, 24384, 17.733), (32, 32384, 19.762), (32, 40384, 21.822), (32, 48384, 24.524),
    ),
    Point("mixed", 512, 0, 512, 37.193), Point("mixed", 512, 4, 4560, 42.115),
    *decodes(  # single_llama2_a100.affine_samples.csv, the last stage of each batch size
        (1, 532, 9.865), (8, 4256, 11.767), (32, 17024, 15.765), (64, 34048, 21.149),
    ),
    Point("mixed", 512, 0, 512, 37.065), Point("mixed", 512, 8, 4688, 42.690),
    *decodes(  # lmsys_llama2_a100.affine_samples.csv: outputs of 25, 100, 300, 500 tokens, the last stage of each
        (1, 56, 9.564), (8, 448, 10.021), (32, 1792, 11.247), (64, 3584, 13.079),
        (1, 137, 9.572), (8, 1096, 10.045), (32, 4384, 12.282), (64, 8768, 14.912),
        (1, 337, 9.839), (8, 2696, 11.103), (32, 10784, 14.452), (64, 21568, 18.909),
        (1, 540, 9.865), (8, 4320, 11.767), (32, 17280, 15.765), (64, 34560, 21.149),
    ),
    Point("mixed", 31, 0, 31, 10.132), Point("mixed", 31, 8, 375, 11.191),
    Point("mixed", 40, 0, 40, 10.285), Point("mixed", 40, 8, 2360, 12.010),
    # single_type_vidur_balanced_mstar_grid.csv: n prompts of p512d20 in each of 2 chunks of 256 and 20 decode stages
    *(
        Point("balanced p512d20", 512 * n, 20 * n, (768 + 20 * 512 + 210) * n, ms)
        for n, ms in enumerate((43.939, 83.175, 121.927, 166.874, 201.196), start=1)
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """A fitted model. half_width: of d1's 95 % interval, seconds per token. errors: relative, one per point."""

    time_model: IterationTimeModel
    half_width: float
    errors: NDArray[np.float64]

    @property
    def d1_interval(self) -> tuple[float, float]:
        return self.time_model.d1_s_per_kv_token - self.half_width, self.time_model.d1_s_per_kv_token + self.half_width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--write-profile", action="store_true")
    args = parser.parse_args()
    if args.write_profile:
        PROFILE_PATH.write_text(json.dumps(profile(), indent=2) + "\n", encoding="utf-8")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "a100-law.md").write_text(page(args.traces), encoding="utf-8")


def fit(points: list[Point], *, free_d3: bool = False) -> Fit:
    """Least squares of the relative errors over `points`, with d3 = d2 unless free_d3."""
    prefill, decode, kv, seconds = arrays(points)
    # In units of 1 ms, 0.1 ms per compute token and 1 µs per KV token all parameters are of one size.
    units = np.array([1e-3, 1e-6, 1e-4, 1e-4, 1e-3])

    def time_model_of(x: NDArray[np.float64]) -> IterationTimeModel:
        d0, d1, d2, floor, *d3 = np.abs(x)
        values = np.array([d0, d1, d2, d3[0] if d3 else d2, floor]) * units
        return IterationTimeModel(*map(float, values))

    def errors(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(time_model_of(x).iteration_s(prefill, decode, kv)) / seconds - 1

    start = [4.0, 0.3, 0.65, 10.0, *([0.65] if free_d3 else [])]
    found = least_squares(errors, start)
    degrees = len(points) - len(start)
    variance = float(found.fun @ found.fun) / degrees
    covariance = np.linalg.inv(found.jac.T @ found.jac) * variance
    half_width = float(student.ppf(0.975, degrees)) * math.sqrt(covariance[1, 1]) * units[1]
    return Fit(time_model_of(found.x), half_width, found.fun)


def d1_alone(points: list[Point], time_model: IterationTimeModel) -> tuple[float, float]:
    """d1 with its 95 % half width when all else of `time_model` is kept."""
    prefill, decode, kv, seconds = arrays(points)
    rest = np.asarray(IterationTimeModel(
        time_model.d0_s, 0.0, time_model.d2_s_per_prefill_token, time_model.d3_s_per_decode_token, time_model.floor_s
    ).iteration_s(prefill, decode, kv))
    x, y = kv / seconds, 1 - rest / seconds
    d1 = float(x @ y / (x @ x))
    left = y - d1 * x
    error = math.sqrt(float(left @ left) / (len(points) - 1) / float(x @ x))
    return d1, float(student.ppf(0.975, len(points) - 1)) * error


def arrays(points: list[Point]) -> tuple[NDArray[np.float64], ...]:
    prefill, decode, kv, ms = np.array([point[1:] for point in points], dtype=float).T
    return prefill, decode, kv, ms / 1000


def profile() -> dict[str, object]:
    """What the profile's file holds: the fit, rounded to three digits."""
    found = fit(POINTS)
    low, high = found.d1_interval
    other = fit(POINTS, free_d3=True)
    time_model = rounded(found.time_model)
    d1, other_d1 = found.time_model.d1_s_per_kv_token, other.time_model.d1_s_per_kv_token
    error, worst = np.abs(found.errors).mean(), np.abs(found.errors).max()
    return {
        "name": NEW,
        "description": "Llama-2-7B in fp16 on one NVIDIA A100 80GB, all of the law fitted to Vidur's iteration times",
        "law": {
            "d0_s": time_model.d0_s, "d1_s_per_kv_token": time_model.d1_s_per_kv_token,
            "d2_s_per_prefill_token": time_model.d2_s_per_prefill_token,
            "d3_s_per_decode_token": time_model.d3_s_per_decode_token, "floor_s": time_model.floor_s,
        },
        "kv_capacity_tokens": load_profile(OLD).kv_capacity_tokens,
        "provenance": [
            f"Least squares of relative errors over {len(POINTS)} iteration times that Vidur predicts, as published in "
            "the repository of the authors of arXiv 2504.11320 (outputs/fluid_memory): decode batches of 1 to 64 with "
            "56 to 48384 KV tokens, a prefill chunk with 0 to 8 decodes, balanced p512d20 batches of 1 to 5 a stage. "
            f"Mean relative error {error:.1%}, largest {worst:.1%}.",
            f"d1 = {micro(d1)} us per KV token, 95 % interval {micro(low)} to {micro(high)}; "
            f"with d3 fitted apart from d2 {micro(other_d1)} ({micro(other.d1_interval[0])} to "
            f"{micro(other.d1_interval[1])}).",
            "d3 = d2, since decodes pass through the same linear layers; a d3 of its own fits batches of 64 better and "
            "would make batches of hundreds too dear beside the linear layers' published times.",
            "Vidur extrapolates beyond batches of 128 and counts no host time; it is a simulator, no measurement.",
            "KV capacity: 1.37e5 tokens as in arXiv 2504.11320. Made by benchmarks/evidence/a100_law.py.",
        ],
    }  # fmt: skip


def rounded(time_model: IterationTimeModel) -> IterationTimeModel:
    """Three significant digits of each term."""
    return IterationTimeModel(*(float(f"{value:.3g}") for value in astuple(time_model)))


def micro(seconds: float) -> str:
    return f"{1e6 * seconds:.3f}"


def capacity_rps(mix: WorkloadMix, time_model: IterationTimeModel) -> str:
    """The fluid capacity of one request a second's mix under a model, and its limit."""
    fluid = solve_fluid(mix, time_model, load_profile(OLD).kv_capacity_tokens)
    return f"{fluid.critical_rate_scale:.2f} ({fluid.limit})"


def page(traces: Path | None) -> str:
    old, new = load_profile(OLD).time_model, rounded(fit(POINTS).time_model)
    lengths = {name: name for name in ("p512d20", "0.7:p512d20+0.3:p512d50", "p512d1000", "lmsys")}
    if traces is not None:
        lengths["Azure conversation"] = f"@{traces / 'azure_conv_2023.csv'}"
    mixes = {
        name: open_workload(WorkloadConfig(lengths=text, requests=1, rate_rps=1.0)).mix()
        for name, text in lengths.items()
    }
    time_models = old, new, rounded(fit(POINTS, free_d3=True).time_model)
    capacities = [
        f"| {name} | " + " | ".join(capacity_rps(mix, time_model) for time_model in time_models) + " |"
        for name, mix in mixes.items()
    ]
    text = PAGE.format(
        command=COMMAND, points="\n".join(point_row(point, old, new) for point in shown()),
        time_models=time_model_table(), d1=d1_table(), capacities="\n".join(capacities),
        count=len(POINTS), saturation=saturation(new),
        old_errors=error_text(old), new_errors=error_text(new), bandwidth=bandwidth(new),
        old_d1=f"{old.d1_s_per_kv_token * 1e6:.2f}",
        old_bandwidth=f"{KV_BYTES_PER_TOKEN / old.d1_s_per_kv_token / 1e12:.2f} TB/s",
        layers=f"{old.d2_s_per_prefill_token * 1e6:.1f}",
    )
    return with_conclusion(text, a100_law)


def bandwidth(time_model: IterationTimeModel) -> str:
    """What d1 means for the KV cache's reads."""
    achieved = KV_BYTES_PER_TOKEN / time_model.d1_s_per_kv_token
    return f"{achieved / 1e12:.2f} TB/s, {achieved / BANDWIDTH_BYTES_PER_S:.0%} of the GPU's published bandwidth,"


def shown() -> list[Point]:
    """Of the decode batches, those with most and least KV of each size; all others."""
    kept = []
    for point in POINTS:
        same = [p.kv for p in POINTS if p.kind == "decodes" and p.decodes == point.decodes]
        if point.kind != "decodes" or point.kv in (min(same), max(same)):
            kept.append(point)
    return sorted(kept, key=lambda p: (p.kind, p.decodes, p.kv))


def point_row(point: Point, old: IterationTimeModel, new: IterationTimeModel) -> str:
    batch = float(point.prefill), float(point.decodes), float(point.kv)
    times = [time_model.iteration_s(*batch) * 1000 for time_model in (old, new)]
    time_models = " | ".join(f"{ms:.1f} ({100 * (ms / point.ms - 1):+.0f} %)" for ms in times)
    return f"| {point.kind} | {point.prefill} | {point.decodes} | {point.kv} | {point.ms:.1f} | {time_models} |"


def error_text(time_model: IterationTimeModel) -> str:
    prefill, decode, kv, seconds = arrays(POINTS)
    errors = np.asarray(time_model.iteration_s(prefill, decode, kv)) / seconds - 1
    decode_only = np.array([point.kind == "decodes" and point.kv >= 20_000 for point in POINTS])
    return (
        f"{np.abs(errors).mean():.1%} | {np.abs(errors).max():.1%} | {errors[decode_only].mean():+.1%}"
    )


def time_model_table() -> str:
    """The terms of each profile and fit."""
    models = {
        f"`{OLD}`": load_profile(OLD).time_model,
        f"`{NEW}`": rounded(fit(POINTS).time_model),
        "d3 apart from d2": rounded(fit(POINTS, free_d3=True).time_model),
        "`a100-llama2-7b-paper`": load_profile("a100-llama2-7b-paper").time_model,
    }
    return "\n".join(
        f"| {name} | {model.d0_s * 1000:.2f} | {model.floor_s * 1000:.2f} | {model.d2_s_per_prefill_token * 1e6:.1f} | "
        f"{model.d3_s_per_decode_token * 1e6:.1f} | {micro(model.d1_s_per_kv_token)} |"
        for name, model in models.items()
    )


def d1_table() -> str:
    """d1 and its interval by what else is fitted."""
    time_model = load_profile(OLD).time_model
    same, apart = fit(POINTS), fit(POINTS, free_d3=True)
    rows = [("all terms, d3 = d2", same.time_model.d1_s_per_kv_token, same.half_width, len(POINTS)),
            ("all terms, d3 apart from d2", apart.time_model.d1_s_per_kv_token, apart.half_width, len(POINTS))]
    for kind in ("decodes", "balanced p512d20"):
        points = [point for point in POINTS if point.kind == kind]
        rows.append((f"d1 alone, {kind} only", *d1_alone(points, time_model), len(points)))
    return "\n".join(
        f"| {name} | {micro(d1)} | {micro(d1 - half)} to {micro(d1 + half)} | {count} |"
        for name, d1, half, count in rows
    )


def saturation(new: IterationTimeModel) -> str:
    """Completions per second of the largest balanced batch: Vidur's and both profiles'."""
    point = POINTS[-1]
    batch = float(point.prefill), float(point.decodes), float(point.kv)
    ours = [5 / time_model.iteration_s(*batch) for time_model in (load_profile(OLD).time_model, new)]
    return f"{5 / point.ms * 1000:.2f} /s under Vidur, {ours[0]:.2f} under `{OLD}`, {ours[1]:.2f} under `{NEW}`"


PAGE = """# Where the A100's iteration-time model comes from

<!-- conclusion: begin -->
<!-- conclusion: end -->

Made by `{command}` (`--traces FOLDER` for the Azure row). The {count} points are
iteration times of Llama-2-7B on one A100 80GB as the Vidur simulator predicts them, published with arXiv 2504.11320 in
its authors' repository (`outputs/fluid_memory`). They are a simulator's, made from kernel profiles; no GPU was measured
for this page.

## The model

τ = max(floor, d0 + d2·prefill + d3·decodes) + d1·KV

| profile or fit | d0, ms | floor, ms | d2, µs | d3, µs | d1, µs per KV token |
|---|---|---|---|---|---|
{time_models}

## Errors

Relative errors over all points, and the mean signed error on decode batches with at least 20 000 KV tokens.

| profile | mean | largest | on these decode batches |
|---|---|---|---|
| `a100-llama2-7b` | {old_errors} |
| `a100-llama2-7b-vidur` | {new_errors} |

## d1, and what its interval depends on

| fitted | d1, µs | 95 % interval | points |
|---|---|---|---|
{d1}

With everything else kept as in `a100-llama2-7b`, decode batches and balanced batches contradict each other: no d1
serves both, because that profile adds 2 ms of host time, which Vidur does not count, and has no term for the attention
of a prompt. So all terms are fitted together. With 512 KiB a token, d1 is an effective
{bandwidth} under the fit; the {old_d1} µs of `a100-llama2-7b` are {old_bandwidth}.

A d3 of its own fits the batches of 64 decodes better, but there are no larger ones among the points, and the linear
layers' published times ({layers} µs a token between 128 and 512) say that hundreds of decodes cost d2 each. So
d3 = d2 in the profile; the last column of the capacities says what that decides.

## Point by point

Of the decode batches, those with the least and the most KV of each size.

| batch | prompt tokens | decodes | KV tokens | Vidur, ms | `a100-llama2-7b` | `a100-llama2-7b-vidur` |
|---|---|---|---|---|---|---|
{points}

The largest balanced batch of p512d20 completes {saturation}.

## What it changes

Fluid capacity, requests/s, 137 000 KV tokens:

| lengths | `a100-llama2-7b` | `a100-llama2-7b-vidur` | with d3 apart from d2 |
|---|---|---|---|
{capacities}

[The paper's experiments](paper-tables.md) use `a100-llama2-7b-vidur`, since the figures beside them came out of
Vidur. All other pages use `a100-llama2-7b`, which remains the default: it includes host time, so it is the more
careful one for a replica that has a host.
"""


if __name__ == "__main__":
    main()
