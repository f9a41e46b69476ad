"""Request routers of other projects, as their documentation and code describe them, beside ours (`router.ranking`).

Each ingress has its own router. What they see of the replicas is always current here, which favours them. A prompt is a
text with one character for each token, so that Ray's own prefix tree and llm-d's approximate one see what is shared.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, ClassVar, Protocol

from replicas.prompt_blocks import blocks_of
from router.prefixes import Prefixes

_MATCH_RATE = 0.1
"""Ray's `match_rate_threshold`."""
_BLOCK_TOKENS, _BLOCKS_KEPT = 16, 31_250
"""llm-d's approximate prefix cache: tokens of a block, and blocks remembered for each replica."""
_PREFIX_WEIGHT, _QUEUE_WEIGHT, _KV_WEIGHT = 3.0, 2.0, 2.0
"""llm-d's default scorers and their weights."""


class Replica(Protocol):
    """What a router may see of a replica: its number; requests there, those that wait, the share of KV cache used."""

    index: int

    @property
    def ongoing(self) -> int: ...
    @property
    def queued(self) -> int: ...
    @property
    def kv_used_fraction(self) -> float: ...


class RivalRouter(ABC):
    """Chooses a replica for each request."""

    reads_prompts: ClassVar[bool] = False

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    @abstractmethod
    def choose(self, replicas: Sequence[Any], prompt: str) -> Any:
        """The replica for a request with this prompt; "" for routers that read none."""


class RoundRobin(RivalRouter):
    """One after the other; an ingress starts anywhere."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._turns: Any = None

    def choose(self, replicas: Sequence[Any], prompt: str) -> Any:
        """The next in turn."""
        if self._turns is None:
            self._turns = cycle(range(len(replicas)))
            for _ in range(self._rng.randrange(len(replicas))):
                next(self._turns)
        return replicas[next(self._turns)]


class PowerOfTwo(RivalRouter):
    """Ray Serve's default: of two replicas at random the one with fewer requests."""

    def choose(self, replicas: Sequence[Any], prompt: str) -> Any:
        """The less busy of two."""
        return min(self._rng.sample(replicas, min(2, len(replicas))), key=lambda replica: replica.ongoing)


class LeastRequests(RivalRouter):
    """The replica with the fewest requests; ties at random."""

    def choose(self, replicas: Sequence[Any], prompt: str) -> Any:
        """The least busy."""
        return min(self._rng.sample(replicas, len(replicas)), key=lambda replica: replica.ongoing)


class RayPrefix(RivalRouter):
    """Ray Serve LLM's `PrefixCacheAffinityRouter` at its defaults, over its own prefix tree.

    The longest match wins when it covers a tenth of the prompt, else the replica whose texts are the fewest; among
    several, the one with the fewest requests.
    """

    reads_prompts = True

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._tree: Any = None
        self._inserted = 0

    def choose(self, replicas: Sequence[Any], prompt: str) -> Any:
        """By prefix, then by load; remembers where the prompt went."""
        if self._tree is None:
            from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree import PrefixTree

            self._tree = PrefixTree()
            self._tree.add_tenants([str(replica.index) for replica in replicas], 0.0)
        by_name = {str(replica.index): replica for replica in replicas}
        matched, names = self._tree.prefix_match(prompt, list(by_name))
        if not prompt or len(matched) / len(prompt) < _MATCH_RATE:
            names = self._tree.get_smallest_tenants()
        found = [by_name[name] for name in names or by_name]
        chosen = min(self._rng.sample(found, len(found)), key=lambda replica: replica.ongoing)
        self._inserted += 1
        self._tree.insert(prompt, str(chosen.index), float(self._inserted))
        return chosen


class LlmD(RivalRouter):
    """llm-d's default profile: approximate prefix cache, queue depth and KV use, weighted; the highest score wins."""

    reads_prompts = True

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._prefixes: Prefixes[int] = Prefixes()

    def choose(self, replicas: Sequence[Any], prompt: str) -> Any:
        """The highest score; ties at random."""
        blocks = blocks_of(prompt, _BLOCK_TOKENS)
        names = [replica.index for replica in replicas]
        held = dict(zip(names, self._prefixes.held(blocks, names), strict=True))
        waits = [replica.queued for replica in replicas]
        fewest, spread = min(waits), max(waits) - min(waits)

        def score(replica: Any) -> float:
            queue = 1.0 - (replica.queued - fewest) / spread if spread else 1.0
            prefix = held[replica.index] / len(blocks) if blocks else 0.0
            free = 1.0 - float(replica.kv_used_fraction)
            return _PREFIX_WEIGHT * prefix + _QUEUE_WEIGHT * queue + _KV_WEIGHT * free

        chosen = max(self._rng.sample(replicas, len(replicas)), key=score)
        self._prefixes.sent(blocks, chosen.index, _BLOCKS_KEPT)
        return chosen


RIVAL_ROUTERS: dict[str, Callable[[random.Random], RivalRouter]] = {
    "round-robin": RoundRobin, "power-of-two": PowerOfTwo, "least-requests": LeastRequests, "ray-prefix": RayPrefix,
    "llm-d": LlmD,
}
ROUTERS = ("fluid", *RIVAL_ROUTERS)


def parse_speeds(text: str, replicas: int) -> tuple[float, ...]:
    """The speed of each replica, `1,1,1,0.5`, over and over until each has one.

    Raises ValueError for a text of another form and for speeds out of range.
    """
    try:
        given = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"speeds {text!r} must be numbers with commas between, such as 1,1,1,0.5") from None
    if not all(0 < speed < math.inf for speed in given):
        raise ValueError(f"speeds {text!r}: each must be a finite number above 0")
    if len(given) > replicas:
        raise ValueError(f"speeds {text!r} has {len(given)} numbers for {replicas} replicas; give at most one for each")
    return tuple(given[index % len(given)] for index in range(replicas))
