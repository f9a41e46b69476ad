"""Where a request goes: the order in which it is offered to replicas. No Ray.

A request goes where it is predicted to end first: the wait for its prompt's turn, the prompt, and its output tokens at
the pace that the replica then has, slower by what each request sent there adds. A pace with slack, within less than its
target, counts for less, so that the first token decides where nothing presses. Every replica publishes these numbers
(`scheduler.messages.Outlook`), solved by the same fluid model that admits its requests, so that a slow or a full one is
avoided by as much as it is slower. What a replica probably holds of the prompt in its prefix cache
(`router.prefixes`) is not computed there; where it would be computed although another replica holds it, that also
takes the time of all requests that run there, which this one's own end does not show. So a conversation stays where it
was while that saves all together more than the wait there costs. A beginning that many prompts share comes to be held
by as many replicas as are busy with them, since each copy serves many.

A replica whose queue has no room left comes after all that have some: one that rejects looks idle, and must not attract
more.

Between two reports the router keeps count of what it has sent and what has ended (`Sent`). Several ingresses do not
see each other's requests, but they see the same reports: each takes what it has sent itself as the part of one among
equals, less what of it is chance, where that would send a conversation away from what holds it
(`router.places.of_all`). And so that they do not all choose the same replica, each looks at a random part of the
replicas only, one among as many as there are ingresses, and at the one that holds most.

What an engine says may be older than it seems: one that hangs in an iteration still reports, the same each time. So a
replica never counts as having fewer requests than Serve last knew it to have.

Replicas that predict nothing, those of other policies than `fluid`, are ranked by their share of free slots.
"""

from __future__ import annotations

import math
import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Generic, NamedTuple, TypeVar

from replicas.routing_stats import RoutingStats
from router.places import Places, Taken, of_all
from router.prefixes import PrefixCaches
from scheduler.fluid_params import LEAST_PROMPT_SHARE

_KEPT_S = 10.0
_SILENT_S = 5.0
"""A replica that has reported nothing new for so long, some periods of Serve's, counts as one without a report: its
engine may be frozen."""
_USUAL_AGE_S = 1.0
_ON_ITS_WAY_S = 2.0
"""Most seconds that a report takes to come here; an older one is of a clock that runs behind."""
_FEWEST_LOOKED_AT = 2
_CLEARLY_MORE = 1.5
_MOST_REQUESTS, _MOST_WITH_BLOCKS = 65_536, 2_048
"""Requests that are remembered of which no end is heard, and those of them with what their prompts consist of."""
_Replica = TypeVar("_Replica")
_Name = TypeVar("_Name", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Asked:
    """What is known of a request: its prompt tokens; its output tokens if a client declared or bounded them; of how
    many requests it consists, choices times prompts; and the blocks of its prompt (`replicas.prompt_blocks`)."""

    prompt_tokens: float = 0.0
    output_tokens: float = math.inf
    requests: int = 1
    blocks: Sequence[int] = ()

    def to_compute(self, held_tokens: float) -> float:
        """Prompt tokens that a replica computes which holds so many; at least one."""
        return max(min(1.0, self.prompt_tokens), self.prompt_tokens - held_tokens)


class _At(NamedTuple):
    """Where a request is, and the prompt tokens that it brought there."""

    replica: Any
    asked: Asked
    tokens: float


class Sent(Generic[_Name]):
    """What one router has sent to each replica lately, and what of it has ended; safe from several threads.

    clock: seconds of this process, which never go back. wall_clock: seconds as in the reports.
    """

    def __init__(self, clock: Callable[[], float], wall_clock: Callable[[], float]) -> None:
        self.clock, self._wall_clock = clock, wall_clock
        self._places: dict[_Name, Places] = {}
        self.caches: PrefixCaches[_Name] = PrefixCaches()
        self._at: OrderedDict[str, _At] = OrderedDict()
        self._with_blocks: deque[str] = deque()
        self._heard: dict[_Name, tuple[float, float, float]] = {}
        self._lock = threading.Lock()

    def sent(self, request_id: str, replica: _Name, asked: Asked | None = None) -> None:
        """A request goes to a replica; when it was thought to be at another one, it has left that. asked: what is known
        of it; None: what was said before."""
        with self._lock:
            before = self._at.get(request_id)
            if before is not None and before.replica == replica:
                return
            if before is not None:
                self._change(before.replica, -before.asked.requests, -before.tokens)
            asked = asked or (before.asked if before else Asked())
            tokens = asked.to_compute(self.caches.held(asked.blocks, [replica]).tokens[0])
            self._at[request_id] = _At(replica, asked, tokens)
            self._change(replica, asked.requests, tokens)
            while len(self._at) > _MOST_REQUESTS:
                self._at.popitem(last=False)
            self._with_blocks.append(request_id)
            while len(self._with_blocks) > _MOST_WITH_BLOCKS:
                self._without_blocks(self._with_blocks.popleft())

    def accepted(self, request_id: str, replica: _Name) -> None:
        """A replica has taken a request, and will hold its prompt."""
        self.sent(request_id, replica)
        with self._lock:
            at = self._at.get(request_id)
            if at is None or not at.asked.blocks:  # it may have ended meanwhile
                return
            self._without_blocks(request_id)
        self.caches.sent(at.asked.blocks, at.asked.prompt_tokens, replica)

    def _without_blocks(self, request_id: str) -> None:
        at = self._at.get(request_id)
        if at is not None and at.asked.blocks:
            self._at[request_id] = at._replace(asked=replace(at.asked, blocks=()))

    def ended(self, request_id: str, replica: _Name) -> None:
        """A request is over at a replica, whatever came of it; its prompt has been worked on."""
        with self._lock:
            before = self._at.get(request_id)
            if before is not None and before.replica == replica:
                del self._at[request_id]
                self._change(replica, -before.asked.requests, 0.0)

    def reported_s(self, replica: _Name, stats: RoutingStats) -> float | None:
        """When a replica reported this, by this router's clock; None: too long ago."""
        now_s, at_s = self.clock(), stats.at_s
        if at_s is None:
            return now_s - _USUAL_AGE_S
        with self._lock:
            heard = self._heard.get(replica)
            is_new = heard is None or heard[0] != at_s
            if heard is None or is_new:
                age_s = self._wall_clock() - at_s
                plausible_s = age_s if 0 <= age_s <= _ON_ITS_WAY_S else _USUAL_AGE_S
                heard = self._heard[replica] = at_s, now_s, now_s - plausible_s
        if is_new:
            self.caches.reported(
                replica, stats.kv_capacity_tokens, stats.prompt_tokens, stats.cached_tokens, stats.marks
            )
        return heard[2] if now_s - heard[1] <= _SILENT_S else None

    def since(self, replica: _Name, at_s: float) -> Taken:
        """Requests sent less those ended, and prompt tokens sent, since a report; of the last few seconds at most."""
        with self._lock:
            places = self._places.get(replica)
            return places.since(at_s) if places else Taken(0, 0.0)

    def keep(self, replicas: Collection[_Name]) -> None:
        """Forget all but these replicas."""
        with self._lock:
            for known in (self._places, self._heard):
                for replica in known.keys() - set(replicas):
                    del known[replica]
        self.caches.keep(replicas)

    def _change(self, replica: _Name, requests: int, tokens: float) -> None:
        self._places.setdefault(replica, Places(_KEPT_S)).change(self.clock(), requests, tokens)


def best_first(
    replicas: Sequence[_Replica], report: Callable[[_Replica], RoutingStats | None],
    name: Callable[[_Replica], _Name], sent: Sent[_Name], asked: Asked, *,
    ongoing: Callable[[_Replica], int] = lambda _: 0, ingresses: int = 1, rng: random.Random | None = None,
) -> list[_Replica]:
    """The replicas in the order of preference; those without a report come last, the ones with the fewest requests
    first.

    ongoing: requests that a replica has by Serve's own count, which may be old but not too high for long. ingresses:
    how many of them send to these replicas.
    """
    rng = rng or _RANDOM
    shuffled = rng.sample(replicas, len(replicas))
    looked_at = max(_FEWEST_LOOKED_AT, math.ceil(len(replicas) / ingresses))
    reports = [report(replica) for replica in shuffled]
    names = [name(replica) for replica in shuffled]
    reported_s = [sent.reported_s(of, one) if one else None for of, one in zip(names, reports, strict=True)]
    held = sent.caches.held(asked.blocks, names)
    most_held = max(held.tokens, default=0.0)
    usual = [one.outlook.output_tokens for one in reports if one is not None and one.outlook is not None]
    # How long an answer is depends on the request: replicas that have seen others must not differ by it.
    output_tokens = min(asked.output_tokens, sum(usual) / len(usual)) if usual else None
    now_s = sent.clock()
    reported = {of: at_s for of, at_s in zip(names, reported_s, strict=True) if at_s is not None}
    own = {of: sent.since(of, at_s) for of, at_s in reported.items()}
    ages_s = [now_s - at_s for at_s in reported.values()]
    every = of_all(list(own.values()), ages_s, ingresses, spread=not _is_held_by_few(held.tokens))
    by_all = dict(zip(own, every, strict=True))

    def key(place: int) -> tuple[bool, bool, bool, float]:
        replica, stats = shuffled[place], reports[place]
        at_s = reported_s[place]
        if stats is None or at_s is None:
            return True, True, True, ongoing(replica)
        untried = stats.outlook is None and bool(usual)  # where it counts whether one is there for certain
        taken = _taken((own if untried else by_all)[names[place]], stats, ongoing(replica), asked)
        full = stats.room is not None and stats.room <= taken.requests
        cost = -stats.slack(stats.occupied + taken.requests)
        if output_tokens is not None:
            cost = completion_s(stats, asked.to_compute(held.tokens[place]), output_tokens, taken, now_s - at_s)
            cost += lost_s(stats, held.again[place], taken)
        seen = place < looked_at or held.tokens[place] == most_held > 0
        return False, full, not seen, cost

    return [shuffled[place] for place in sorted(range(len(shuffled)), key=key)]


def _is_held_by_few(tokens: Sequence[float]) -> bool:
    """Whether some replica holds clearly more of a prompt than most do, as of a conversation; of a beginning that all
    prompts share, every replica soon holds as much."""
    return bool(tokens) and max(tokens) > _CLEARLY_MORE * median(tokens)


def _taken(known: Taken, stats: RoutingStats, ongoing: int, asked: Asked) -> Taken:
    """What has gone to a replica since its report: what is known, and at least the requests that it has now and the
    report has not, which are taken to be like this one."""
    unseen = ongoing - stats.occupied
    each = asked.prompt_tokens / asked.requests
    tokens = max(known.tokens, unseen * each)
    return known._replace(requests=max(known.requests, unseen), tokens=tokens)


def completion_s(
    stats: RoutingStats, prompt_tokens: float, output_tokens: float, taken: Taken, age_s: float
) -> float:
    """Seconds in which a request is predicted to end at a replica that reported `age_s` seconds ago, to which `taken`
    has gone since, and that has `prompt_tokens` of it to compute.

    Output tokens count by the square of the share that they take of their target: with much slack a wait for the first
    token is worse than a pace that is a little slower, and without any the pace is what misses. One that predicts
    nothing, as before its first request, is taken only if it is empty."""
    outlook = stats.outlook
    if outlook is None:
        return math.inf if stats.occupied + taken.requests > 0 else 0.0
    token_s = max(0.0, outlook.token_s + taken.requests * outlook.added_s)
    used = token_s / outlook.limit_s if outlook.limit_s else 0.0
    prompt_s = outlook.prompt_s / max(LEAST_PROMPT_SHARE, 1.0 - used)
    pressing = min(1.0, used) ** 2 if outlook.limit_s else 1.0
    wait_s = taken.wait_s(outlook.wait_s, prompt_s, age_s)
    return wait_s + prompt_tokens * prompt_s + output_tokens * token_s * pressing


def lost_s(stats: RoutingStats, tokens_again: float, taken: Taken) -> float:
    """Seconds that the requests which run at a replica lose, all together, while it computes prompt tokens that need
    not be: each of them waits as long."""
    running = max(0.0, stats.occupied + taken.requests)
    return tokens_again * stats.outlook.prompt_s * running if stats.outlook and tokens_again else 0.0


_RANDOM = random.Random()
