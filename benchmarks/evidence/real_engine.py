"""Service levels on the real engine over HTTP, as clients see them, docs/evidence/real-engine.md.

    python benchmarks/evidence/real_engine.py --model .models/SmolLM2-135M-Instruct [--stacks headrace,plain] [--quick]

Brings up one stack after the other with the same engine settings, lets it learn, and sends each the same requests with
`headrace bench` at 1, 2 and 3 times `--capacity`. About 9 minutes a stack on two cores; --quick, one load for a few
seconds, about 4. Needs a quiet machine; how quiet it was is part of the page. --from FILE writes the page from the rows
of an earlier run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import yaml
from real_engine_page import page

from cluster.ports import free_port
from scheduler.tuning.slo import Slo

HERE = Path(__file__).resolve()
HEADRACE = Path(sys.executable).with_name("headrace")
HEADRACE_STACK, PLAIN_STACK = "Headrace", "Ray Serve LLM"
STACKS = {"headrace": HEADRACE_STACK, "plain": PLAIN_STACK}
LOADS, QUICK_LOADS = (1.0, 2.0, 3.0), (1.0,)
LENGTHS = "0.5:p16d16+0.5:p32d32"
TARGETS = Slo(ttft_s=4.0, tpot_s=0.3)
PROFILE = "cpu-smollm2"
ENGINE = {
    "max_model_len": 512, "max_num_seqs": 64, "max_num_batched_tokens": 512, "dtype": "float32", "enforce_eager": True,
}
READY_TIMEOUT_S, STOP_TIMEOUT_S = 420.0, 90.0
TIMEOUT_S = 60.0  # more than a good request of the longest answers takes
FILL_S = 15.0
NOISE_PIECES, NOISE_WORK = 200, 200_000
SHOWN = (
    "completed", "rejected", "timed_out", "failed", "goodput_rps", "served_ttft_miss_fraction",
    "served_tpot_miss_fraction", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "send_lag_p99_s",
)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--policy", default="fluid")
    parser.add_argument("--stacks", default="headrace,plain", help="which, in this order: headrace, plain")
    parser.add_argument("--capacity", type=float, default=2.4, help="what 1x is, requests/s")
    parser.add_argument("--seconds", type=float, default=110.0, help="of arrivals at each load; the first 15 fill")
    parser.add_argument("--learn", type=float, default=100.0, help="seconds of arrivals at 1x before that")
    parser.add_argument("--starts", type=int, default=2, help="of each stack")
    parser.add_argument("--quick", action="store_true", help="8 s at 1x; for a try-out")
    parser.add_argument("--from", dest="rows", type=Path, help="rows.json of an earlier run; nothing is measured")
    parser.add_argument("--conditions", default="", help="a sentence for the page on what else ran on the machine")
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    parser.add_argument("--work", type=Path, default=Path("runs/real-engine"))
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.learn, args.starts = FILL_S + 8.0, 10.0, 1
    args.loads = QUICK_LOADS if args.quick else LOADS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the stack under way is stopped, too
    args.work.mkdir(parents=True, exist_ok=True)
    if args.rows is None:
        rows: list[Row] = []
        for start, stack in product(range(1, args.starts + 1), args.stacks.split(",")):
            rows += measure(args, STACKS[stack], start)
            (args.work / "rows.json").write_text(json.dumps(rows, indent=1))
    else:
        rows = json.loads(args.rows.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    text = page(rows, {
        "command": f"python benchmarks/evidence/real_engine.py --model {args.model}", "policy": args.policy,
        "lengths": LENGTHS, "ttft_s": TARGETS.ttft_s, "tpot_s": TARGETS.tpot_s, "capacity_rps": args.capacity,
        "seconds": args.seconds, "fill_s": FILL_S, "learn_s": args.learn, "cores": os.cpu_count(),
        "timeout_s": TIMEOUT_S, "conditions": args.conditions,
    })
    (args.out / "real-engine.md").write_text(text)
    print(text)


def machine_noise() -> list[float]:
    """Seconds that each of many equal pieces of work takes on one core, sorted."""
    seconds = []
    for _ in range(NOISE_PIECES):
        begun_s = time.perf_counter()
        sum(range(NOISE_WORK))
        seconds.append(time.perf_counter() - begun_s)
    return [float(np.quantile(seconds, q)) for q in (0.5, 0.9, 0.99)]


def configuration(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """What `headrace up` reads; the plain stack takes its `llm_configs` from it too."""
    targets = {"ttft_s": TARGETS.ttft_s, "tpot_s": TARGETS.tpot_s} if args.policy == "fluid" else {}
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    model = {
        "model_loading_config": {"model_id": "smollm2-135m", "model_source": str(Path(args.model).resolve())},
        "accelerator_config": {"kind": "cpu"},
        "deployment_config": {"num_replicas": 1},
        "engine_kwargs": ENGINE,
        "log_engine_metrics": False,
        "runtime_env": {"env_vars": env},
    }
    headrace = {
        "thresholds": {"policy": args.policy}, "targets": targets,
        "controller": {"period_s": 5.0, "profile": PROFILE},
    }
    app = {"llm_configs": [model], "headrace": headrace}
    return {
        "ray": {"address": "local"}, "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {"name": "headrace", "import_path": "headrace:build", "route_prefix": "/", "args": app}
        ],
    }


def measure(args: argparse.Namespace, stack: str, start: int) -> list[Row]:
    """One row a load, all on one start of the stack; every start is sent the same."""
    rows = []
    with running(args, stack) as url:
        noise = machine_noise()  # beside the idle stack
        bench(url, args.capacity, args.learn, ["--seed", "99"])
        for seed, load in enumerate(args.loads, 1):
            rate_rps, before = load * args.capacity, engine_counts(url, stack)
            summary = bench(url, rate_rps, args.seconds, [
                "--seed", str(seed), "--label", stack, "--warmup", str(round(FILL_S * rate_rps)),
                "--out", str(args.work / f"{stack}-{load:g}-{start}".replace(" ", "-")),
            ])
            row = {"stack": stack, "start": start, "load": load, "requests": summary["requests"], "noise": noise}
            row |= {name: summary[name] for name in SHOWN}
            row["engine"] = {name: count - before[name] for name, count in engine_counts(url, stack).items()}
            row["forecast"] = forecast_of(url, stack)
            rows.append(row)
            print(row, flush=True)
    return rows


def bench(url: str, rate_rps: float, seconds: float, options: list[str]) -> dict[str, Any]:
    command = [
        HEADRACE, "bench", "--url", url, "--lengths", LENGTHS, "--slo-ttft", str(TARGETS.ttft_s),
        "--slo-tpot", str(TARGETS.tpot_s), "--timeout", str(TIMEOUT_S), "--json", "--rate", f"{rate_rps:.4f}",
        "--duration", f"{seconds:g}", *options,
    ]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


def state_of(url: str) -> dict[str, Any]:
    (replica,) = httpx.get(f"{url}/admin/state", trust_env=False, timeout=30.0).json()["replicas"].values()
    return dict(replica)


def engine_counts(url: str, stack: str) -> dict[str, int]:
    """What Headrace's engine counted; nothing of the plain stack."""
    if stack != HEADRACE_STACK:
        return {}
    counters = state_of(url)["counters"]
    return {name: counters[name] for name in ("completed", "ttft_misses", "tpot_misses")}


def forecast_of(url: str, stack: str) -> dict[str, Any]:
    """What the controller of Headrace expects when a load has ended."""
    if stack != HEADRACE_STACK:
        return {}
    state = state_of(url)
    forecast, time_model = state["forecast"] or {}, state["time_model"] or {}
    names = ("capacity_rps", "tpot_margin", "delivery_s", "miss_probability")
    return {name: forecast.get(name) for name in names} | {
        "iteration_error_std": (forecast.get("iteration_error_std") or {}).get("value"), "law_r2": time_model.get("r2"),
    }


@contextlib.contextmanager
def running(
    args: argparse.Namespace, stack: str, made: Callable[[int, int], dict[str, Any]] | None = None
) -> Iterator[str]:
    """The stack's URL; stopped by Ctrl-C, and nothing of it is left behind. made: the configuration for two ports, HTTP
    and metrics."""
    port, metrics_port = free_port(), free_port()
    config = args.work / "cluster.yaml"
    config.write_text(yaml.safe_dump(made(port, metrics_port) if made else configuration(args, port)))
    log = args.work / f"{stack.replace(' ', '-')}.log"
    plain = [sys.executable, str(HERE.with_name("plain_ray_llm.py")), str(config), str(metrics_port)]
    with log.open("w") as file:
        # In this session: with Linux's autogroup, a session that fills the CPUs can starve others, such as the clients.
        process = subprocess.Popen(
            [HEADRACE, "up", str(config)] if stack == HEADRACE_STACK else plain,
            stdout=file, stderr=file, process_group=0, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while "ready at" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{stack} did not start:\n{log.read_text()}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    for member in (*psutil.wait_procs(family, timeout=10)[1], process):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


if __name__ == "__main__":
    main()
