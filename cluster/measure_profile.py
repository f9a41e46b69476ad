"""Measure the iteration-time model of an engine on this machine: `headrace profile measure`.

Runs the real engine over a grid of batch sizes and prompt lengths, reads its iteration records through the live channel
and fits τ = max(floor, d0 + d2·prefill + d3·decode) + d1·kv. A second pass over other points checks the fit.
"""

from __future__ import annotations

import asyncio
import os
import platform
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scheduler.config_errors import CommandFailed
from scheduler.engine.channel import ChannelClient, new_endpoint, remove_endpoint
from scheduler.estimation.iteration_time_fit import FitRejected, IterationTimeFit, fit_iteration_time
from scheduler.messages import Iteration, Telemetry
from scheduler.model.profiles import Profile

OUTPUT_TOKENS = 16
_TIMEOUT_S = 30.0
_WORST_ERROR = 0.5
"""Mean relative error on held-out iterations beyond which there is no profile: the machine was not idle."""
_CPU_DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The points that are measured: batch sizes 1, 2, 4 … with prompts of 16, 64, 256 … tokens, up to the largest.

    most_prompt_tokens: of all prompts of a point together.
    """

    largest_batch: int
    longest_prompt: int
    most_prompt_tokens: int

    @property
    def points(self) -> list[tuple[int, int]]:
        """Batch size and prompt length of every point."""
        batches = _up_to(self.largest_batch, 1, 2)
        prompts = _up_to(self.longest_prompt, 16, 4)
        return [(b, p) for b in batches for p in prompts if b * p <= self.most_prompt_tokens]


CPU_GRID = Grid(largest_batch=32, longest_prompt=512, most_prompt_tokens=2048)
GPU_GRID = Grid(largest_batch=256, longest_prompt=4096, most_prompt_tokens=65_536)


def _up_to(largest: int, first: int, times: int) -> list[int]:
    found, value = [], first
    while value < largest:
        found.append(value)
        value *= times
    return [*found, largest]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """The engine to measure: vLLM's own arguments. model: a folder or a hub's name; the others, where given, as vLLM
    takes them."""

    model: str
    arguments: dict[str, Any]
    seed: int = 0


def measure(
    engine: Engine, name: str, grid: Grid | None = None, progress: Callable[[str], None] = lambda line: None
) -> Profile:
    """Start the engine, drive it over the grid, and fit; minutes on a CPU.

    Raises:
        CommandFailed: the iterations do not give a model.
    """
    for key, value in _CPU_DEFAULTS.items():
        os.environ.setdefault(key, value)
    from vllm import LLM
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    grid = grid or (CPU_GRID if on_cpu else GPU_GRID)
    endpoint = new_endpoint()
    progress("starting the engine")
    llm = LLM(
        engine.model, seed=engine.seed, enable_prefix_caching=False,
        scheduler_cls="headrace.HeadraceScheduler", additional_config={"headrace": {"channel": endpoint}},
        **{"enforce_eager": on_cpu, "max_num_seqs": max(64, grid.largest_batch), **engine.arguments},
    )
    try:
        drive(llm, grid, engine.seed, points=4)  # warm-up: the first calls allocate and page in
        first = asyncio.run(_report(endpoint))
        progress(f"measuring {len(grid.points)} points")
        drive(llm, grid, engine.seed + 1)
        training = asyncio.run(_report(endpoint, first.cursor))
        progress("measuring them again, to check the fit")
        drive(llm, grid, engine.seed + 2)
        held_out = asyncio.run(_report(endpoint, training.cursor))
    finally:
        remove_endpoint(endpoint)
    device = "one CPU thread, vLLM's CPU build" if on_cpu else current_platform.get_device_name()
    return fitted_profile(engine, name, device, training, held_out)


def drive(llm: Any, grid: Grid, seed: int, points: int | None = None) -> None:
    """Every point once, in random order; the batch size is a limit within one call."""
    from vllm import SamplingParams

    order = grid.points
    generator = random.Random(seed)
    generator.shuffle(order)
    for batch, prompt in order[:points]:
        prompts = [{"prompt_token_ids": generator.choices(range(100, 20_000), k=prompt)} for _ in range(batch)]
        params = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True, temperature=0.0)
        llm.generate(prompts, params, use_tqdm=False)


def fitted_profile(engine: Engine, name: str, device: str, training: Telemetry, held_out: Telemetry) -> Profile:
    """The profile out of an engine's records, checked on others.

    Raises:
        CommandFailed: they do not give a model.
    """
    fit = fit_iteration_time(*_columns(training.iterations))
    if isinstance(fit, FitRejected):
        raise CommandFailed(f"no iteration-time model: {fit.reason}; measure on an idle machine, over a larger grid")
    r2, mape = held_out_error(fit, held_out.iterations)
    if mape > _WORST_ERROR:
        raise CommandFailed(f"the model errs by {mape:.0%} on iterations it has not seen; measure on an idle machine")
    model = Path(engine.model).name
    given = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in engine.arguments.items())
    machine = [f"Device: {device}.", f"Machine: {os.cpu_count()} cores, {platform.machine()}"]
    machine[1] += f", OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}."
    return Profile(
        name=name, description=f"{model} on {device}, measured", time_model=fit.time_model,
        kv_capacity_tokens=training.limits.kv_capacity_tokens,
        provenance=(
            f"Measured with headrace profile measure --model {model} --name {name} {given}".rstrip() + ".",
            *machine,
            f"Fit: {fit.records} iterations, R2 {fit.r2:.4f}, MAPE {fit.mape:.4f}.",
            f"Identified: {', '.join(fit.identified)}.",
            f"Held out: {len(held_out.iterations)} iterations, R2 {r2:.4f}, MAPE {mape:.4f}.",
            "KV capacity: the engine's own.",
        ),
    )


def held_out_error(fit: IterationTimeFit, iterations: tuple[Iteration, ...]) -> tuple[float, float]:
    """R² and the mean relative error on records that the fit has not seen."""
    prefill, decode, kv, seconds = _columns(iterations)
    residual = seconds - fit.time_model.iteration_s(prefill, decode, kv)
    r2 = 1 - np.sum(residual**2) / np.sum((seconds - seconds.mean()) ** 2)
    return float(r2), float(np.mean(np.abs(residual) / seconds))


def _columns(iterations: tuple[Iteration, ...]) -> tuple[Any, Any, Any, Any]:
    table = np.array([[i.prefill_tokens, i.decode_tokens, i.kv_tokens, i.seconds] for i in iterations])
    if not table.size:
        raise CommandFailed("the engine has recorded no iteration")
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]


async def _report(endpoint: str, cursor: int = 0) -> Telemetry:
    client = ChannelClient(endpoint)
    try:
        return await client.report(cursor, timeout_s=_TIMEOUT_S)
    finally:
        client.close()
