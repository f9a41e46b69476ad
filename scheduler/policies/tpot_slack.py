"""TPOT slack of the running requests, which a long prefill may use.

A TPOT target bounds a request's mean time per token, so iterations shorter than the target build up slack: a request
with s tokens, e seconds after its first one, has (s − 1)·target − e. An iteration may exceed the target by the smallest
slack at no cost. It may exceed it by more if the requests that fall behind are likely to catch up before they end; the
cost is the expected number of requests that end before that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Survives = Callable[[NDArray[np.int64], Floats], Floats]
_SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1)


class TpotSlack:
    """Seconds by which the next iteration may exceed `token_s`, the planned time per token.

    under_way: iterations composed before the results of one are known.
    """

    def __init__(self, token_s: float, survives: Survives, under_way: int = 1) -> None:
        self._token_s, self._survives = token_s, survives
        self._used_s: deque[float] = deque(maxlen=under_way)

    def use_none(self) -> None:
        """The next iteration uses no slack."""
        self._used_s.append(0.0)

    def spare_s(
        self, stages: NDArray[np.int64], first_token_s: Floats, now_s: float, wanted_s: float, *, gain_s: float,
        misses: float,
    ) -> float:
        """Seconds beyond the plan, at most `wanted_s`.

        stages: output tokens of the running requests, 0 during prefill. first_token_s: clock second of the first one
        (NaN: not yet). gain_s: seconds that a request regains per later token, 0 at capacity. misses: accepted expected
        number of requests that miss their target because of `wanted_s`; proportionally fewer for a smaller excess.
        """
        decoding = stages > 0
        tokens, since_s = stages[decoding], first_token_s[decoding]
        slack_s = np.where(np.isnan(since_s), 0.0, (tokens - 1) * self._token_s - (now_s - since_s))
        # The slack used by iterations under way is not in these times yet; their tokens are counted already.
        slack_s = slack_s - self._token_s * (~np.isnan(since_s)) - sum(self._used_s)
        self._used_s.append(self._most_s(tokens, slack_s, wanted_s, gain_s, misses))
        return self._used_s[-1]

    def _most_s(
        self, tokens: NDArray[np.int64], slack_s: Floats, wanted_s: float, gain_s: float, misses: float
    ) -> float:
        if not tokens.size:
            return wanted_s
        if gain_s > 0:
            for share in _SHARES:
                behind_s = np.maximum(share * wanted_s - slack_s, 0.0)
                late = behind_s > 0
                ends = 1.0 - self._survives(tokens[late], np.ceil(behind_s[late] / gain_s))
                if float(ends.sum()) <= share * misses:
                    return share * wanted_s
        return float(min(wanted_s, max(0.0, slack_s.min())))
