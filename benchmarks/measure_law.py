"""Measure the iteration-time model of an engine on this machine, and write it as a profile.

    python benchmarks/measure_law.py --model .models/SmolLM2-135M-Instruct --name cpu-smollm2 \
        --output scheduler/profiles/cpu-smollm2.json

Runs the real engine over a grid of batch sizes and prompt lengths, reads its iteration records through the live channel
and fits τ = max(floor, d0 + d2·prefill + d3·decode) + d1·kv. A second pass over other points checks the fit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from vllm import LLM, SamplingParams

from scheduler.engine.channel import ChannelClient, new_endpoint, remove_endpoint
from scheduler.estimation.iteration_time_fit import FitRejected, IterationTimeFit, fit_iteration_time
from scheduler.messages import Iteration, Telemetry

OUTPUT_TOKENS = 16
BATCHES = (1, 2, 4, 8, 16, 32)
PROMPTS = (16, 64, 256, 512)
MOST_PREFILL_TOKENS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-batched-tokens", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    endpoint = new_endpoint()
    llm = LLM(
        args.model, max_model_len=args.max_model_len, max_num_seqs=64, enforce_eager=True, dtype=args.dtype,
        max_num_batched_tokens=args.max_num_batched_tokens, enable_prefix_caching=False, seed=args.seed,
        scheduler_cls="scheduler.vllm_scheduler.HeadraceScheduler",
        additional_config={"headrace": {"channel": endpoint}},
    )
    try:
        drive(llm, args.seed, points=4)  # warm-up: the first calls allocate and page in
        first = asyncio.run(report(endpoint))
        drive(llm, args.seed + 1)
        training = asyncio.run(report(endpoint, first.cursor))
        drive(llm, args.seed + 2)
        held_out = asyncio.run(report(endpoint, training.cursor))
    finally:
        remove_endpoint(endpoint)

    fit = fit_iteration_time(*columns(training.iterations))
    if isinstance(fit, FitRejected):
        raise SystemExit(f"no iteration-time model: {fit.reason}")
    error = held_out_error(fit, held_out.iterations)
    profile = as_profile(args, fit, training, held_out, error)
    text = json.dumps(profile, indent=2) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


def drive(llm: LLM, seed: int, points: int | None = None) -> None:
    """Every batch size with every prompt length once, in random order; the batch size is a limit within one call."""
    order = [(batch, prompt) for batch in BATCHES for prompt in PROMPTS if batch * prompt <= MOST_PREFILL_TOKENS]
    generator = random.Random(seed)
    generator.shuffle(order)
    for batch, prompt in order[:points]:
        prompts = [{"prompt_token_ids": generator.choices(range(100, 40_000), k=prompt)} for _ in range(batch)]
        params = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True, temperature=0.0)
        llm.generate(prompts, params, use_tqdm=False)


async def report(endpoint: str, cursor: int = 0) -> Telemetry:
    client = ChannelClient(endpoint)
    try:
        return await client.report(cursor, timeout_s=30.0)
    finally:
        client.close()


def columns(iterations: tuple[Iteration, ...]) -> tuple[Any, Any, Any, Any]:
    table = np.array([[i.prefill_tokens, i.decode_tokens, i.kv_tokens, i.seconds] for i in iterations])
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]


def held_out_error(fit: IterationTimeFit, iterations: tuple[Iteration, ...]) -> dict[str, float]:
    prefill, decode, kv, seconds = columns(iterations)
    predicted = fit.time_model.iteration_s(prefill, decode, kv)
    residual = seconds - predicted
    return {
        "r2": float(1 - np.sum(residual**2) / np.sum((seconds - seconds.mean()) ** 2)),
        "mape": float(np.mean(np.abs(residual) / seconds)),
    }


def as_profile(
    args: argparse.Namespace, fit: IterationTimeFit, training: Telemetry, held_out: Telemetry, error: dict[str, float]
) -> dict[str, Any]:
    return {
        "name": args.name,
        "description": f"{Path(args.model).name} in {args.dtype} on one CPU thread, vLLM's CPU build",
        "law": asdict(fit.time_model),
        "kv_capacity_tokens": training.limits.kv_capacity_tokens,
        "provenance": [
            f"Measured with benchmarks/measure_law.py --model {Path(args.model).name} --name {args.name}.",
            f"Machine: {os.cpu_count()} cores, {platform.machine()}, OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}.",
            f"Fit: {fit.records} iterations, R2 {fit.r2:.4f}, MAPE {fit.mape:.4f}.",
            f"Identified: {', '.join(fit.identified)}.",
            f"Held out: {len(held_out.iterations)} iterations, R2 {error['r2']:.4f}, MAPE {error['mape']:.4f}.",
            f"KV capacity: VLLM_CPU_KVCACHE_SPACE={os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB.",
        ],
    }


if __name__ == "__main__":
    main()
