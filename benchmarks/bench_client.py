"""`headrace bench` beside vLLM's own `vllm bench serve`: one server, the same load, the same numbers.

    python benchmarks/bench_client.py --model .models/SmolLM2-135M-Instruct [--repeats 3] [--requests 60] [--rate 1.0]

Sends evenly spaced requests of random prompts by the one client and by the other in turns, and prints the ratios of
what they measured; evenly spaced, because by chance two Poisson streams queue differently. First to a stand-in that
sends its tokens at known times, so that only the clients differ; then (not with --only-paced) to plain vLLM on this
machine's CPU; its own times vary unless the machine is quiet. About 14 minutes.

Both post to /v1/completions and take a time when an event with a token has been read. TTFT is from sending to the first
such time, in `vllm bench serve` from when its task runs and in `headrace bench` from when the request was due (so the
latter has the client's own delay in it); TPOT is (last − first) / (tokens − 1), tokens as the server counted them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import httpx
from aiohttp import web

from cluster.ports import free_port

HEADRACE = Path(sys.executable).with_name("headrace")
# vLLM's CPU build has no working `vllm` command; this is what `vllm bench serve` runs.
VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
}
MEASURES = {  # by headrace's names
    "ttft_mean_s": "mean_ttft_ms", "ttft_p50_s": "median_ttft_ms", "tpot_mean_s": "mean_tpot_ms",
    "tpot_p50_s": "median_tpot_ms",
}
READY_TIMEOUT_S = 300.0
PACED_TTFT_S, PACED_TPOT_S = 0.3, 0.08

Measured = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--output", type=int, default=32, help="tokens")
    parser.add_argument("--only-paced", action="store_true")
    args = parser.parse_args()
    print(f"a stand-in: first token after {PACED_TTFT_S} s, the others every {PACED_TPOT_S} s")
    with paced_server(args.model) as url:
        compare(url, args)
    if not args.only_paced:
        print("\nplain vLLM")
        with vllm_server(args.model) as url:
            compare(url, args)


def compare(url: str, args: argparse.Namespace) -> None:
    by_headrace(url, args, seed=0)  # warm-up: the first calls allocate and page in
    pairs = []
    for repeat in range(1, args.repeats + 1):
        pairs.append((by_headrace(url, args, seed=2 * repeat), by_vllm(url, args, seed=2 * repeat + 1)))
        print_pair(repeat, *pairs[-1])
    print_ratios(pairs)


@contextlib.contextmanager
def paced_server(model: str) -> Iterator[str]:
    """A server in a thread that sends every token at its time, whatever the load."""

    async def complete(request: web.Request) -> web.StreamResponse:
        begun_s = loop.time()
        body = await request.json()
        tokens = body["max_tokens"]
        # vLLM's tool sends text, and its tokens are not counted here.
        prompt = len(body["prompt"]) if isinstance(body["prompt"], list) else None
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(tokens):
            await asyncio.sleep(begun_s + PACED_TTFT_S + number * PACED_TPOT_S - loop.time())
            finish = "length" if number == tokens - 1 else None
            await response.write(event(choices=[{"index": 0, "text": "a", "finish_reason": finish}]))
        usage = {"completion_tokens": tokens} | ({"prompt_tokens": prompt} if prompt else {})
        await response.write(event(choices=[], usage=usage) + b"data: [DONE]\n\n")
        return response

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": model}]})

    async def start() -> str:
        app = web.Application()
        app.add_routes([web.get("/v1/models", models), web.post("/v1/completions", complete)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    yield asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)


def event(**data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


@contextlib.contextmanager
def vllm_server(model: str) -> Iterator[str]:
    """Plain vLLM on a free port, ended whatever happens."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", "float32",
         "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "64", "--port", str(port),
         "--host", "127.0.0.1", "--disable-log-stats", "--disable-uvicorn-access-log"],
        env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("vLLM's server did not start; what it said is above")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def by_headrace(url: str, args: argparse.Namespace, seed: int) -> Measured:
    out = subprocess.run(
        [HEADRACE, "bench", "--url", url, "--lengths", f"p{args.prompt}d{args.output}", "--rate", str(args.rate),
         "--arrivals", "uniform", "--requests", str(args.requests), "--seed", str(seed), "--json"],
        check=True, stdout=subprocess.PIPE, env=os.environ,
    ).stdout
    return checked(json.loads(out), args)


def by_vllm(url: str, args: argparse.Namespace, seed: int) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-c", VLLM_BENCH, "--backend", "openai", "--base-url", url, "--model", args.model,
             "--dataset-name", "random", "--random-input-len", str(args.prompt),
             "--random-output-len", str(args.output), "--num-prompts", str(args.requests),
             "--request-rate", str(args.rate), "--burstiness", "inf", "--ignore-eos", "--temperature", "0",
             "--seed", str(seed), "--disable-tqdm", "--save-result", "--result-dir", folder,
             "--result-filename", "result.json"],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | ENVIRONMENT,
        )
        result = json.loads(Path(folder, "result.json").read_text())
    if result["total_input_tokens"] != args.requests * args.prompt:
        print(f"note: vLLM's prompts had {result['total_input_tokens'] / args.requests:.1f} tokens on average")
    return checked({ours: result[theirs] / 1000 for ours, theirs in MEASURES.items()} | result, args)


def checked(result: dict[str, Any], args: argparse.Namespace) -> Measured:
    if result["completed"] != args.requests:
        raise SystemExit(f"{result['completed']} of {args.requests} requests were completed: {result}")
    return {name: result[name] for name in MEASURES}


def print_pair(repeat: int, headrace: Measured, vllm: Measured) -> None:
    for name in MEASURES:
        ours, theirs = headrace[name], vllm[name]
        print(f"{repeat}  {name:12} headrace {ours:.4f}  vllm {theirs:.4f}  ratio {ours / theirs:.4f}", flush=True)


def print_ratios(pairs: list[tuple[Measured, Measured]]) -> None:
    """The mean ratio, its spread over the repeats, and how far each client is from itself between repeats."""
    print("headrace / vllm over", len(pairs), "pairs")
    for name in MEASURES:
        ratios = [headrace[name] / vllm[name] for headrace, vllm in pairs]
        own = [spread([pair[which][name] for pair in pairs]) for which in (0, 1)]
        print(
            f"{name:12} {mean(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f}, sd {spread(ratios):.1%}); "
            f"between repeats headrace varies by {own[0]:.1%}, vllm by {own[1]:.1%}"
        )


def spread(values: list[float]) -> float:
    """Standard deviation relative to the mean; 0 of a single value."""
    return stdev(values) / mean(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
