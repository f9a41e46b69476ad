"""Chats of several turns on two real engines: our router beside plain Ray Serve LLM with its prefix-aware router.

    python benchmarks/real_chats.py --model .models/SmolLM2-135M-Instruct [--stacks headrace,ray] [--sessions 24]

Brings up one stack after the other with two replicas of the same CPU engine, and sends each the same chats: every
session begins with the same system prompt and says its next word after a pause. Prints the share of prompt tokens that
vLLM found in its prefix caches, and the times to first token. About 6 minutes a stack on two quiet cores, which both
engines share, so that times are of this machine only. Ends what it started.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent / "evidence"))

import httpx
from real_engine import ENGINE, HEADRACE_STACK, PLAIN_STACK, configuration, running

STACKS = {"headrace": HEADRACE_STACK, "ray": PLAIN_STACK}
RAY_S_ROUTER = "ray.serve.llm.request_router.PrefixCacheAffinityRouter"
SYSTEM_WORDS, TURN_WORDS, OUTPUT_TOKENS, THINK_S = 80, 20, 16, 3.0
COUNTS = {"queries": "vllm[:_]prefix_cache_queries_total", "hits": "vllm[:_]prefix_cache_hits_total"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--stacks", default="headrace,ray")
    parser.add_argument("--sessions", type=int, default=24)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--gap", type=float, default=3.0, help="mean seconds between two new sessions")
    args = parser.parse_args()
    for name in args.stacks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"stack": name} | measure(args, name, Path(folder))), flush=True)


def stack_configuration(args: argparse.Namespace, name: str, port: int, metrics_port: int) -> dict[str, Any]:
    """Two replicas, and Ray's router for Ray's stack."""
    config = configuration(args, port)
    config["ray"]["metrics_port"] = metrics_port
    (model,) = config["applications"][0]["args"]["llm_configs"]
    model["deployment_config"] = {"num_replicas": 2}
    model["engine_kwargs"] = ENGINE | {"max_model_len": 2048, "enable_prefix_caching": True}
    model["log_engine_metrics"] = True
    if name == "ray":
        model["deployment_config"]["request_router_config"] = {"request_router_class": RAY_S_ROUTER}
    return config


def measure(args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """Hits and times of the chats on one start of a stack."""
    args.work, args.policy = folder, "fluid"
    metrics_ports: list[int] = []

    def made(port: int, metrics_port: int) -> dict[str, Any]:
        metrics_ports.append(metrics_port)
        return stack_configuration(args, name, port, metrics_port)

    with running(args, STACKS[name], made) as url:
        metrics_url = f"http://127.0.0.1:{metrics_ports[0]}/metrics"
        asyncio.run(chats(url, 2, 2, args.gap, random.Random(0)))  # each engine's first requests are slow
        time.sleep(8.0)  # until the metrics have them
        before = counts(metrics_url)
        times_s = asyncio.run(chats(url, args.sessions, args.turns, args.gap, random.Random(1)))
        time.sleep(12.0)
        found = {key: value - before[key] for key, value in counts(metrics_url).items()}
    p50, p90 = (quantiles(times_s, n=100)[place] for place in (49, 89))
    return {
        "requests": len(times_s), "prompt_tokens": found["queries"],
        "hits": round(found["hits"] / max(1.0, found["queries"]), 3), "ttft_p50_s": round(p50, 3),
        "ttft_p90_s": round(p90, 3),
    }


def counts(metrics_url: str) -> dict[str, float]:
    """vLLM's totals over both engines, from Ray's metrics."""
    text = httpx.get(metrics_url, trust_env=False, timeout=30.0).text
    return {
        key: sum(float(value) for value in re.findall(rf"^\w*{name}\{{.*\}} (\S+)", text, re.MULTILINE))
        for key, name in COUNTS.items()
    }


async def chats(url: str, sessions: int, turns: int, gap_s: float, rng: random.Random) -> list[float]:
    """Seconds to the first token of every request; sessions begin at random."""
    system = words(rng, SYSTEM_WORDS)
    async with httpx.AsyncClient(base_url=url, timeout=120.0, trust_env=False) as http:
        running_sessions = []
        for _ in range(sessions):
            said = [words(rng, TURN_WORDS) for _ in range(turns)]
            pauses_s = [rng.expovariate(1 / THINK_S) for _ in range(turns)]
            running_sessions.append(asyncio.create_task(session(http, system, said, pauses_s)))
            await asyncio.sleep(rng.expovariate(1 / gap_s))
        return [one for several in await asyncio.gather(*running_sessions) for one in several]


async def session(http: httpx.AsyncClient, system: str, said: Sequence[str], pauses_s: Sequence[float]) -> list[float]:
    """One chat: each turn has all before it. Seconds to each first token."""
    messages, found = [{"role": "system", "content": system}], []
    for text, pause_s in zip(said, pauses_s, strict=True):
        messages.append({"role": "user", "content": text})
        begun_s, first_s, answer = time.monotonic(), None, ""
        body = {"model": "smollm2-135m", "messages": messages, "max_tokens": OUTPUT_TOKENS, "temperature": 0.0,
                "stream": True}
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code == 429:
                return found  # a client that is rejected leaves
            response.raise_for_status()
            async for line in response.aiter_lines():
                piece = content_of(line)
                if piece and first_s is None:
                    first_s = time.monotonic() - begun_s
                answer += piece
        if first_s is not None:
            found.append(first_s)
        messages.append({"role": "assistant", "content": answer})
        await asyncio.sleep(pause_s)
    return found


def content_of(line: str) -> str:
    """The text that an event of a stream brings."""
    data = line.removeprefix("data: ")
    if data == line or data == "[DONE]":
        return ""
    choices = json.loads(data).get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def words(rng: random.Random, count: int) -> str:
    """Words that no other text has."""
    return " ".join(f"{rng.getrandbits(24):x}" for _ in range(count))


if __name__ == "__main__":
    main()
