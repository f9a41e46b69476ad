"""What our ingress costs beside Ray Serve LLM's own, both in front of the same model server, interleaved in one run.

    python benchmarks/ingress_overhead.py [--requests 300] [--clients 8]

The model server is a fake that answers at once, so that the difference of the two is the ingress's alone; with a real
engine's seconds beside it the ratio is nearer to one. Both applications run on one local Ray, behind one proxy, and
blocks of requests alternate between them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from typing import Any

import aiohttp
from fake_serve import fake_server, local_serve, model_card

MODEL, PORT, BLOCKS = "fake", 8742, 10
BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "word " * 200}], "max_tokens": 16}).encode()
PATHS = {"plain ray.serve.llm": "/plain", "headrace": ""}


def applications() -> dict[str, Any]:
    """By name: an application of Ray's ingress and one of ours, over fake servers of their own."""
    from ray import serve
    from ray.llm._internal.serve.core.ingress.ingress import DEFAULT_ENDPOINTS
    from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

    from cluster.live import SettingsJudge
    from router.http_app import http_app
    from router.ingress import ADMIN_ENDPOINTS, HEALTH_ENDPOINTS, HeadraceIngress, desk_of_this_ingress

    class Ours(HeadraceIngress):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(models={}, judge=SettingsJudge({}), **kwargs)

    endpoints = {**HEALTH_ENDPOINTS, **ADMIN_ENDPOINTS, **DEFAULT_ENDPOINTS}
    ingresses = {
        "plain ray.serve.llm": make_fastapi_ingress(OpenAiIngress),
        "headrace": make_fastapi_ingress(Ours, endpoint_map=endpoints, app=http_app(desk_of_this_ingress)),
    }
    free: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}}
    return {
        name: serve.deployment(ingress, name="Ingress", max_ongoing_requests=1000, **free).bind(
            llm_deployments={MODEL: fake_server(**free)}, model_cards={MODEL: model_card(MODEL)},
        ) for name, ingress in ingresses.items()
    }


async def block(http: aiohttp.ClientSession, path: str, requests: int, clients: int) -> tuple[list[float], float]:
    """Seconds of each request of a closed loop, and requests per second."""
    left, seconds = requests, []

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            begun = time.perf_counter()
            url = f"http://127.0.0.1:{PORT}{path}/v1/chat/completions"
            async with http.post(url, data=BODY, headers={"content-type": "application/json"}) as answer:
                await answer.read()
                assert answer.status == 200, await answer.text()
            seconds.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return seconds, requests / (time.perf_counter() - begun)


async def measure(options: argparse.Namespace) -> None:
    async with aiohttp.ClientSession() as http:
        for path in PATHS.values():
            await block(http, path, 50, options.clients)
        for clients in (1, options.clients):
            medians: dict[str, list[float]] = {name: [] for name in PATHS}
            rates: dict[str, list[float]] = {name: [] for name in PATHS}
            for number in range(BLOCKS):
                for name in sorted(PATHS, reverse=bool(number % 2)):
                    seconds, rate = await block(http, PATHS[name], options.requests // BLOCKS, clients)
                    medians[name].append(statistics.median(seconds))
                    rates[name].append(rate)
            plain, ours = PATHS
            for name in PATHS:
                print(
                    f"{clients} clients, {name}: median {1e3 * statistics.median(medians[name]):.2f} ms, "
                    f"{statistics.median(rates[name]):.0f} requests/s", flush=True,
                )
            latency = statistics.median(o / p for o, p in zip(medians[ours], medians[plain], strict=True))
            rate = statistics.median(o / p for o, p in zip(rates[ours], rates[plain], strict=True))
            print(f"{clients} clients, headrace over plain: latency {latency:.3f}, requests/s {rate:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    with local_serve(PORT):
        from ray import serve

        for name, application in applications().items():
            serve.run(application, name=name.split()[0], route_prefix=PATHS[name] or "/")
        asyncio.run(measure(options))


if __name__ == "__main__":
    main()
