"""What the choice of a replica costs an ingress, with and without prefix knowledge, and what Ray's prefix tree would.

    python benchmarks/routing_cost.py [--requests 6000] [--replicas 64] [--rate 500] [--ingresses 4]

Chats of many turns behind one system prompt, and prompts of 64 000 characters (16 000 tokens) that share nothing. Each
request is read, ranked over all replicas, sent and ended, as `FluidRouter` does it, in one thread without an engine.
Once a second every replica reports, and tells the prompts that it took from as many ingresses as --ingresses says.
Times are CPU time of one request and of those it waits for at Poisson arrivals of that rate, as on a core of its own;
the limit is 1 ms at the median and 4 ms at p95. Ray's tree is matched and inserted into, without a ranking.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from replicas.marks import LatestMarks
from replicas.prompt_blocks import blocks_in
from replicas.routing_stats import ReadReports, RoutingStats
from router.asked import asked_of
from router.ranking import Sent, best_first
from scheduler.messages import Outlook

LONGEST = 64_000
OUTLOOK = Outlook(wait_s=0.1, prompt_s=1e-4, token_s=0.05, added_s=2e-4, limit_s=0.08, output_tokens=200.0)
Body = SimpleNamespace
Choose = Callable[[int, Body], None]
Between = Callable[[int, Body], None]
"""What happens elsewhere before a request, and costs the ingress nothing."""


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


def of_another(body: Body, name: str) -> Body:
    """A request like this one, behind the same system prompt, of a conversation of that name."""
    if hasattr(body, "prompt"):
        return Body(prompt=f"{name} {body.prompt}"[:LONGEST])
    return Body(messages=[body.messages[0], {"role": "user", "content": name}, *body.messages[1:]])


def ours(replicas: int, others: int, *, prefixes: bool) -> tuple[Choose, Between]:
    """Our router's part of a request, and the replicas' reports, of what `others` more ingresses sent, too."""
    names = [f"r{number}" for number in range(replicas)]
    sent: Sent[str] = Sent(time.monotonic, time.time)
    rng, read = random.Random(1), ReadReports()
    said = [
        RoutingStats(
            256, 100, 0.5, room=200, kv_capacity_tokens=500_000,
            outlook=OUTLOOK._replace(token_s=rng.uniform(0.045, 0.055)),
        ) for _ in names
    ]
    marks = {name: LatestMarks() for name in names}
    by_name: dict[str, dict[str, Any]] = {}
    where: dict[int, str] = {}
    took: list[Sequence[int]] = []

    def choose(number: int, body: Body) -> None:
        asked = asked_of(body) if prefixes else replace(asked_of(body), blocks=())
        ranked = best_first(
            names, lambda name: read.of(name, by_name[name]), str, sent, asked, ingresses=others + 1, rng=rng
        )
        sent.sent(str(number), ranked[0], asked)
        sent.accepted(str(number), ranked[0])
        where[number] = ranked[0]
        took.append(asked.blocks)
        if number >= 2000:
            sent.ended(str(number - 2000), where.pop(number - 2000))

    def between(number: int, body: Body) -> None:
        if number:
            marks[where[number - 1]].note(took.pop())
        for other in range(others if prefixes else 0):
            marks[rng.choice(names)].note(blocks_in(of_another(body, f"{number} {other}")))
        for place, name in enumerate(names):  # each at a time of its own
            if number == 0 or number % 500 == 500 * place // replicas:
                by_name[name] = replace(said[place], at_s=time.time(), marks=marks[name].told()).as_dict()

    return choose, between


def ray_s(replicas: int) -> tuple[Choose, Between]:
    """Ray Serve LLM's prefix tree, in this process."""
    from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree import PrefixTree

    names = [f"r{number}" for number in range(replicas)]
    tree, rng = PrefixTree(), random.Random(1)
    tree.add_tenants(names, 0.0)

    def choose(number: int, body: Body) -> None:
        text = body.prompt if hasattr(body, "prompt") else "".join(one["content"] for one in body.messages)
        _, found = tree.prefix_match(text, names)
        tree.insert(text, rng.choice(found or names), float(number))

    return choose, lambda number, body: None


def times_s(choose: Choose, between: Between, bodies: list[Body], rate_rps: float) -> list[float]:
    """Of the later half of the requests: CPU seconds of each, with the wait for those before it."""
    rng, found, wait_s = random.Random(2), [], 0.0
    for number, body in enumerate(bodies):
        between(number, body)
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
    parser.add_argument("--ingresses", type=int, default=4)
    args = parser.parse_args()
    made: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(args.replicas, args.ingresses - 1, prefixes=True),
        "ours, no prefixes": lambda: ours(args.replicas, args.ingresses - 1, prefixes=False),
        "Ray's prefix tree": lambda: ray_s(args.replicas),
    }
    for kind, bodies in (("chats", chats), ("64 000 characters", long_prompts)):
        for name, make in made.items():
            several = list(bodies(args.requests, random.Random(0)))
            took = times_s(*make(), several, args.rate)
            p50, p95, p99 = (1000 * took[int(len(took) * share)] for share in (0.5, 0.95, 0.99))
            print(f"{kind}, {name}: p50 {p50:.2f} ms, p95 {p95:.2f} ms, p99 {p99:.2f} ms", flush=True)


if __name__ == "__main__":
    main()
