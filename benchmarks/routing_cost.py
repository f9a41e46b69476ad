"""What the choice of a replica costs an ingress, with and without prefix knowledge, and what Ray's prefix tree would.

    python benchmarks/routing_cost.py [--requests 6000] [--replicas 64] [--rate 500]

Chats of many turns behind one system prompt, and prompts of 64 000 characters (16 000 tokens) that share nothing. Each
request is read, ranked over all replicas, sent and ended, as `FluidRouter` does it, in one thread without an engine.
Times are CPU time of one request and of those it waits for at Poisson arrivals of that rate, as on a core of its own;
the limit is 1 ms at the median and 4 ms at p95. Ray's tree is matched and inserted into, without a ranking.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from replicas.routing_stats import RoutingStats
from router.asked import asked_of
from router.ranking import Sent, best_first
from scheduler.messages import Outlook

LONGEST = 64_000
OUTLOOK = Outlook(wait_s=0.1, prompt_s=1e-4, token_s=0.05, added_s=2e-4, limit_s=0.08, output_tokens=200.0)
Body = SimpleNamespace
Choose = Callable[[int, Body], None]


def words(rng: random.Random, characters: float) -> str:
    """Text of about so many characters."""
    return " ".join(f"{rng.getrandbits(40):x}" for _ in range(max(1, round(characters / 11))))


def chats(requests: int, rng: random.Random) -> Iterator[Body]:
    """Seven of ten requests go on with a conversation."""
    system, sessions = words(rng, 3200), []
    for _ in range(requests):
        if sessions and rng.random() < 0.7:
            said = rng.choice(sessions)
            said += [{"role": "assistant", "content": words(rng, rng.expovariate(1 / 1000))}]
        else:
            said = [{"role": "system", "content": system}]
            sessions.append(said)
        said += [{"role": "user", "content": words(rng, rng.expovariate(1 / 2000))}]
        if sum(len(one["content"]) for one in said) > LONGEST:
            sessions.remove(said)
        if len(sessions) > 1000:
            sessions.pop(rng.randrange(len(sessions)))
        yield Body(messages=list(said), max_tokens=400)


def long_prompts(requests: int, rng: random.Random) -> Iterator[Body]:
    """Every one of the greatest length, and of its own."""
    text = words(rng, 2 * LONGEST)
    for number in range(requests):
        begin = rng.randrange(LONGEST)
        yield Body(prompt=f"{number} {text[begin : begin + LONGEST]}"[:LONGEST])


def ours(replicas: int, *, prefixes: bool) -> Choose:
    """Our router's part of a request."""
    names = [f"r{number}" for number in range(replicas)]
    sent: Sent[str] = Sent(time.monotonic, time.time)
    rng = random.Random(1)
    reports = [
        RoutingStats(
            256, 100, 0.5, room=200, at_s=time.time(), kv_capacity_tokens=500_000,
            outlook=OUTLOOK._replace(token_s=rng.uniform(0.045, 0.055)),
        ).as_dict() for _ in names
    ]
    by_name = dict(zip(names, reports, strict=True))

    where: dict[int, str] = {}

    def choose(number: int, body: Body) -> None:
        if number % 500 == 0:  # once a second every replica reports
            for report in reports:
                report["headrace"]["at_s"] = time.time()
        asked = asked_of(body) if prefixes else replace(asked_of(body), blocks=())
        ranked = best_first(names, lambda name: RoutingStats.from_dict(by_name[name]), str, sent, asked, rng=rng)
        sent.sent(str(number), ranked[0], asked)
        sent.accepted(str(number), ranked[0])
        where[number] = ranked[0]
        if number >= 2000:
            sent.ended(str(number - 2000), where.pop(number - 2000))

    return choose


def ray_s(replicas: int) -> Choose:
    """Ray Serve LLM's prefix tree, in this process."""
    from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree import PrefixTree

    names = [f"r{number}" for number in range(replicas)]
    tree, rng = PrefixTree(), random.Random(1)
    tree.add_tenants(names, 0.0)

    def choose(number: int, body: Body) -> None:
        text = body.prompt if hasattr(body, "prompt") else "".join(one["content"] for one in body.messages)
        _, found = tree.prefix_match(text, names)
        tree.insert(text, rng.choice(found or names), float(number))

    return choose


def times_s(choose: Choose, bodies: list[Body], rate_rps: float) -> list[float]:
    """Of the later half of the requests: CPU seconds of each, with the wait for those before it."""
    rng, found, wait_s = random.Random(2), [], 0.0
    for number, body in enumerate(bodies):
        begun_s = time.thread_time()
        choose(number, body)
        took_s = wait_s + time.thread_time() - begun_s
        found.append(took_s)
        wait_s = max(0.0, took_s - rng.expovariate(rate_rps))
    return sorted(found[len(found) // 2 :])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--rate", type=float, default=500.0)
    args = parser.parse_args()
    made: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(args.replicas, prefixes=True),
        "ours, no prefixes": lambda: ours(args.replicas, prefixes=False),
        "Ray's prefix tree": lambda: ray_s(args.replicas),
    }
    for kind, bodies in (("chats", chats), ("64 000 characters", long_prompts)):
        for name, make in made.items():
            several = list(bodies(args.requests, random.Random(0)))
            took = times_s(make(), several, args.rate)
            p50, p95, p99 = (1000 * took[int(len(took) * share)] for share in (0.5, 0.95, 0.99))
            print(f"{kind}, {name}: p50 {p50:.2f} ms, p95 {p95:.2f} ms, p99 {p99:.2f} ms", flush=True)


if __name__ == "__main__":
    main()
