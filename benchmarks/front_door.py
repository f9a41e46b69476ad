"""Rejection by the ingress through the real Serve proxy, over a fake model server whose queue is full or free.

    python benchmarks/front_door.py [--seconds 8] [--clients 16] [--python-proxy]

Prints the time to a 429 at a moderate rate, rejections per second with every client asking as fast as it can, the CPU
of the proxy and of the ingress behind each rejection, and the latency of admitted requests alone and beside a flood.
Nothing is generated: the fake server answers at once. --python-proxy: through Serve's own proxy instead of HAProxy.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil
from fake_serve import fake_server, local_serve, model_card

from scheduler.messages import Stats

MODEL = "fake"
BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "word " * 500}], "max_tokens": 16}).encode()
HEADERS = {"content-type": "application/json"}
PORT = 8741


@dataclass(frozen=True)
class Report:
    """A fresh report."""

    model: str
    stats: Stats
    answered_s: float


class Reports:
    """Says that there is `room`; the flooded path differs from the free one by the model's name alone."""

    def __init__(self) -> None:
        self._revisions = itertools.count()

    @property
    def revision(self) -> int:
        """Another one each time, so that the reports do not age."""
        return next(self._revisions)

    def answers(self) -> list[Report]:
        return [
            Report(name, Stats(
                engine_id=name, slots=8, running=8, waiting=4, kv_used_tokens=1, kv_capacity_tokens=2,
                thresholds_version=0, room=room, drain_rps=4.0, retry_after_s=3.0,
            ), time.monotonic() - 0.1) for name, room in (("full", 0), ("free", 1_000_000))
        ]


def application(models: list[str]) -> Any:
    """An ingress over a deployment that answers at once, for each model."""
    from ray import serve
    from ray.llm._internal.serve.core.ingress.ingress import DEFAULT_ENDPOINTS
    from ray.serve.llm.ingress import make_fastapi_ingress

    from cluster.live import SettingsJudge
    from router.gate import open_desk
    from router.http_app import http_app
    from router.ingress import HEALTH_ENDPOINTS, HeadraceIngress, desk_of_this_ingress
    from router.limits import Limits

    class Ingress(HeadraceIngress):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(models={}, judge=SettingsJudge({}), **kwargs)
            limits = Limits(concurrent_requests=None)
            self.desk = open_desk((), limits, {}, Reports(), models)

        async def pid(self) -> int:
            return os.getpid()

    endpoints = {**HEALTH_ENDPOINTS, **DEFAULT_ENDPOINTS, "pid": lambda app: app.get("/pid")}
    ingress = make_fastapi_ingress(Ingress, endpoint_map=endpoints, app=http_app(desk_of_this_ingress))
    server = fake_server(ray_actor_options={"num_cpus": 0})
    return serve.deployment(
        ingress, name="Ingress", max_ongoing_requests=4000, ray_actor_options={"num_cpus": 0}
    ).bind(
        llm_deployments=dict.fromkeys(models, server),
        model_cards={name: model_card(name) for name in models},
    )


async def asked(http: aiohttp.ClientSession, model: str) -> tuple[int, float]:
    """Status and seconds of one request."""
    begun = time.perf_counter()
    body = BODY.replace(b'"fake"', json.dumps(model).encode(), 1)
    async with http.post(f"http://127.0.0.1:{PORT}/v1/chat/completions", data=body, headers=HEADERS) as answer:
        await answer.read()
        return answer.status, time.perf_counter() - begun


async def at_rate(http: aiohttp.ClientSession, model: str, rate_rps: float, seconds: float) -> list[tuple[int, float]]:
    """Open loop: one request every 1/rate seconds."""
    tasks, begun = [], time.perf_counter()
    for number in range(round(rate_rps * seconds)):
        await asyncio.sleep(max(0.0, begun + number / rate_rps - time.perf_counter()))
        tasks.append(asyncio.create_task(asked(http, model)))
    return list(await asyncio.gather(*tasks))


async def flood(http: aiohttp.ClientSession, model: str, clients: int, seconds: float) -> list[tuple[int, float]]:
    """Closed loop: so many clients, each asking again at once."""
    end = time.perf_counter() + seconds
    answers: list[tuple[int, float]] = []

    async def client() -> None:
        while time.perf_counter() < end:
            answers.append(await asked(http, model))

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


def told(name: str, answers: list[tuple[int, float]], status: int) -> None:
    wrong = [one for one in answers if one[0] != status]
    ms = sorted(1000 * seconds for _, seconds in answers)
    print(
        f"{name}: {len(ms)} answers, {len(wrong)} other than {status}; median {statistics.median(ms):.1f} ms, "
        f"p90 {ms[int(0.9 * len(ms))]:.1f}, p99 {ms[int(0.99 * len(ms))]:.1f}, most {ms[-1]:.1f}", flush=True,
    )


def cpu_s(*processes: psutil.Process) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(one.user + one.system for one in times))


async def measure(options: argparse.Namespace) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http:
        async with http.get(f"http://127.0.0.1:{PORT}/pid") as answer:
            ingress = psutil.Process(int(await answer.text()))
        proxies = [
            process for process in psutil.Process().children(recursive=True)
            if process.name() == "haproxy" or "ProxyActor" in " ".join(process.cmdline())
        ]
        for model in ("full", "free"):
            await at_rate(http, model, 50.0, 2.0)
        told("time to 429, 20 requests/s", await at_rate(http, "full", 20.0, options.seconds), 429)
        told("admitted alone, 20 requests/s", await at_rate(http, "free", 20.0, options.seconds), 200)
        before = cpu_s(*proxies), cpu_s(ingress)
        begun = time.perf_counter()
        answers = await flood(http, "full", options.clients, options.seconds)
        seconds = time.perf_counter() - begun
        used = cpu_s(*proxies) - before[0], cpu_s(ingress) - before[1]
        told(f"flood of {options.clients} clients", answers, 429)
        print(
            f"rejections/s {len(answers) / seconds:.0f}; CPU per rejection: proxy {1e3 * used[0] / len(answers):.2f} "
            f"ms, ingress {1e3 * used[1] / len(answers):.2f} ms; so one core for both does "
            f"{len(answers) / sum(used):.0f} rejections/s", flush=True,
        )
        beside = asyncio.create_task(at_rate(http, "full", 100.0, options.seconds))
        told("admitted beside 100 rejections/s", await at_rate(http, "free", 20.0, options.seconds), 200)
        told("rejected beside 20 admitted/s", await beside, 429)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--python-proxy", action="store_true")
    options = parser.parse_args()
    with local_serve(PORT, with_haproxy=not options.python_proxy):
        from ray import serve

        serve.run(application(["full", "free"]), name="front-door", route_prefix="/")
        asyncio.run(measure(options))


if __name__ == "__main__":
    main()
