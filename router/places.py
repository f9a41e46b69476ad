"""Places taken and given back lately: what an ingress knows better than a report that is some time old. No Ray."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

ON_THE_WAY_S = 0.03
"""A request sent this long before a report may not have been in the engine yet; one that ended this long after may
already have left it."""
_PROMPTS_OF_CHANCE = 1.0
"""Prompts sent to each replica between two reports at which half of the difference between replicas is chance."""


class Taken(NamedTuple):
    """Places taken less those given back, and the prompt tokens that were sent. prompts: when they were, as pairs of
    seconds after the report and tokens, the first one first."""

    requests: float
    tokens: float
    prompts: tuple[tuple[float, float], ...] = ()

    def wait_s(self, reported_s: float, token_s: float, age_s: float) -> float:
        """Seconds until a prompt's turn at a replica that said `reported_s` so long ago, at `token_s` for each prompt
        token. It works on what it has as time passes, and idles where that is done before more comes; tokens that no
        pair accounts for came evenly."""
        wait_s, before_s, last_s = reported_s, 0.0, max(0.0, age_s)
        evenly_s = (self.tokens - sum(tokens for _, tokens in self.prompts)) * token_s
        if not last_s:
            return max(0.0, wait_s + self.tokens * token_s)
        falls = 1.0 - evenly_s / last_s
        for after_s, tokens in self.prompts:
            after_s = min(max(after_s, before_s), last_s)
            wait_s = max(0.0, wait_s - (after_s - before_s) * falls) + tokens * token_s
            before_s = after_s
        return max(0.0, wait_s - (last_s - before_s) * falls)


def of_all(own: Sequence[Taken], ages_s: Sequence[float], ingresses: int, *, spread: bool) -> list[Taken]:
    """What as many ingresses have sent to each of some replicas since its report, from what one of them has sent.

    The others choose by the same reports, so they send where this one does; but the fewer it has sent, the more of
    where they went is chance, and the nearer each replica is taken to be to the rate of all. ages_s: of the reports,
    which do not come at the same time. spread: not so, since to avoid where this one has just sent something costs
    nothing, and spreads what all send."""
    if ingresses == 1 or not own:
        return list(own)
    others = ingresses - 1
    sent = sum(len(taken.prompts) for taken in own) / len(own)
    like_own = 1.0 if spread else sent / (sent + _PROMPTS_OF_CHANCE)
    spans_s = [max(0.0, age_s) + ON_THE_WAY_S for age_s in ages_s]
    requests_per_s, tokens_per_s = (
        (1.0 - like_own) * sum(column) / sum(spans_s) for column in zip(*(taken[:2] for taken in own), strict=True)
    )
    return [
        Taken(
            requests + others * (like_own * requests + requests_per_s * span_s),
            tokens + others * (like_own * tokens + tokens_per_s * span_s), prompts,
        ) for (requests, tokens, prompts), span_s in zip(own, spans_s, strict=True)
    ]


class _Change(NamedTuple):
    at_s: float
    requests: int
    tokens: float


class Places:
    """The changes of one queue, kept for `keep_s` seconds. Their times do not go back."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._changes: deque[_Change] = deque()

    def change(self, now_s: float, requests: int, tokens: float = 0.0) -> None:
        """So many places are taken, or given back when negative; `tokens`: of the prompts that take them."""
        while self._changes and self._changes[0].at_s < now_s - self._keep_s:
            self._changes.popleft()
        self._changes.append(_Change(now_s, requests, tokens))

    def since(self, at_s: float) -> Taken:
        """What has changed since a report. It walks over all of that: for the few changes of one replica."""
        requests, prompts = 0, []
        for change in reversed(self._changes):
            if change.at_s < at_s - ON_THE_WAY_S:
                break
            if change.requests > 0 or change.at_s > at_s + ON_THE_WAY_S:
                requests += change.requests
                if change.tokens:
                    prompts.append((change.at_s - at_s, change.tokens))
        return Taken(requests, sum(tokens for _, tokens in prompts), tuple(reversed(prompts)))


class CountedPlaces(Places):
    """With the sums of the places taken, and of those given back, before each change and in all: so what has changed
    since each of many reports is found by search, without a walk."""

    def __init__(self, keep_s: float) -> None:
        super().__init__(keep_s)
        self._at_s: deque[float] = deque()
        self._taken, self._given_back = deque([0]), deque([0])

    def change(self, now_s: float, requests: int, tokens: float = 0.0) -> None:
        """See `Places.change`."""
        super().change(now_s, requests, tokens)
        self._at_s.append(now_s)
        self._taken.append(self._taken[-1] + max(requests, 0))
        self._given_back.append(self._given_back[-1] + max(-requests, 0))
        while len(self._at_s) > len(self._changes):
            for kept in (self._at_s, self._taken, self._given_back):
                kept.popleft()

    def requests_since(self, reported_s: Sequence[float]) -> int:
        """The requests of `since`, summed over several reports."""
        early = map(bisect_left, repeat(self._at_s), [at_s - ON_THE_WAY_S for at_s in reported_s])
        late = map(bisect_right, repeat(self._at_s), [at_s + ON_THE_WAY_S for at_s in reported_s])
        before = sum(map(self._taken.__getitem__, early)) - sum(map(self._given_back.__getitem__, late))
        return len(reported_s) * (self._taken[-1] - self._given_back[-1]) - before
