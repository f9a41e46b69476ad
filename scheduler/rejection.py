"""A request that an engine turns away, with the reason and a time to retry.

It leaves the engine as the stop reason of an aborted output: a JSON object under a marker key. The ingress turns it
into an HTTP error with a sentence and a `Retry-After` header.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from http import HTTPStatus

REJECTION_KEY = "headrace_rejection"
"""Marks the JSON object: `{"headrace_rejection": {"reason": "…", "retry_after_s": 7, "kind": "rejected"}}`."""

TOO_LATE = "the first token can no longer meet its latency target"
TOO_MANY = "queue full: one more request could not meet its latency target"
_WORDS = {TOO_LATE: "too_late", TOO_MANY: "queue_full"}

_ABORT = "abort"
_LONGEST_S = 60.0
"""OpenAI clients ignore longer times or treat them as a failure."""
_JITTER = 0.25


class Kind(StrEnum):
    """What happens to the request.

    rejected: it could not meet its target; it is over. recalled: its replica stops and it has cost no token; another
    replica serves it. ended: its replica stopped before the answer was complete.
    """

    REJECTED = "rejected"
    RECALLED = "recalled"
    ENDED = "ended"

    @property
    def http_status(self) -> HTTPStatus:
        """The status of the error that a client, or the ingress, gets."""
        return HTTPStatus.TOO_MANY_REQUESTS if self is Kind.REJECTED else HTTPStatus.SERVICE_UNAVAILABLE


@dataclass(frozen=True, slots=True)
class Rejection:
    """reason: in words; retry_after_s: whole seconds after which to come again: for `rejected` those in which the queue
    is expected to have drained."""

    reason: str
    retry_after_s: int
    kind: Kind = Kind.REJECTED

    @classmethod
    def for_drain_time(
        cls, reason: str, drain_s: float, request_id: str, kind: Kind = Kind.REJECTED
    ) -> Rejection:
        """Retry after the queue's drain time ± 25 %, from 1 to 60 s; 1 s if it is not known.

        The jitter follows from the request's id: requests rejected together come back apart, and reruns agree.
        """
        known_s = drain_s if drain_s == drain_s else 1.0
        # The limits hold for the middle of the range, so that there is jitter at the limits too.
        middle_s = min(max(known_s, 1.0), _LONGEST_S / (1 + _JITTER))
        digest = hashlib.blake2b(request_id.encode(errors="replace"), digest_size=8).digest()
        drawn = int.from_bytes(digest) / 2**64
        return cls(reason, max(1, math.ceil(middle_s * (1 - _JITTER + 2 * _JITTER * drawn))), kind)

    @property
    def word(self) -> str:
        """The reason in a word, for the metrics: too_late, queue_full, other."""
        return _WORDS.get(self.reason, "other")

    @property
    def text(self) -> str:
        """The sentence that a client reads."""
        return f"{self.kind}: {self.reason}; retry in {self.retry_after_s} s"

    def as_json(self) -> str:
        """The marked object that `from_json` reads."""
        return json.dumps({REJECTION_KEY: asdict(self)})

    @classmethod
    def from_json(cls, text: object) -> Rejection | None:
        """The rejection that `text` encodes; None for any other text."""
        if not isinstance(text, str) or REJECTION_KEY not in text:
            return None
        try:
            data = json.loads(text)
            found = data[REJECTION_KEY]
            return cls(str(found["reason"]), int(found["retry_after_s"]), Kind(found["kind"]))
        except (ValueError, TypeError, KeyError):
            return None

    @classmethod
    def of_answer(cls, finish_reason: object, stop_reason: object) -> Rejection | None:
        """The rejection in an output of the engine; None for any other output.

        Source: vLLM's CompletionOutput. An output that ends at a client's stop string has finish reason "stop", so it
        is never taken for a rejection.
        """
        return cls.from_json(stop_reason) if finish_reason == _ABORT else None
