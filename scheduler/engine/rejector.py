"""Which requests an engine turns away before they cost anything, and what their clients are told.

Part of the fence around vLLM's non-public surface (`Request`, `EngineCoreOutput`): `tests/scheduler/test_vllm_seam.py`
fails when an upgrade moves it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.request import Request

from scheduler.engine.admission_queue import AdmissionQueue
from scheduler.engine.choices import family_of, parent_of
from scheduler.engine.lives import Life
from scheduler.rejection import Rejection


class Rejector:
    """Rejections of one engine. audit_share: of those chosen by itself, so many are served all the same.

    `never` are ids that no rejection touches; `undelivered` those that ended and whose clients have not heard of it.
    """

    def __init__(self, admission_queue: AdmissionQueue, lives: Mapping[str, Life], audit_share: float) -> None:
        self._queue, self._lives, self._audit_share = admission_queue, lives, audit_share
        self._under_way: set[str] = set()
        self.undelivered: list[tuple[Request, Rejection]] = []
        self.never: set[str] = set()

    def choose(self, requests: list[Request], reason: str, drain_s: float) -> dict[str, Rejection]:
        """Of requests that have not cost anything yet, those to end, with their siblings, by id.

        Those of an HTTP request that is under way are let in instead.
        """
        rejected: dict[str, Rejection] = {}
        for request in requests:
            name = request.request_id
            if name in self.never or self._is_audited(name):
                self._queue.choices.commit(name)  # it goes on waiting for its turn
            elif name in self._queue.choices.committed:
                self._queue.let_through(request)
            elif name not in rejected:
                rejection = Rejection.for_drain_time(reason, drain_s, family_of(name) or name)
                rejected |= dict.fromkeys(self._queue.choices.reject(name, rejection), rejection)
        return rejected

    def _is_audited(self, name: str) -> bool:
        """Whether this request is served though it should be rejected: drawn by its id, so that a rerun agrees."""
        if parent_of(name) is not None or name not in self._lives:
            return False
        drawn = int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=8, key=b"audit").digest())
        self._lives[name].audited = drawn < self._audit_share * 2**64
        return self._lives[name].audited

    def begin(self, rejected: Mapping[str, Rejection], requests: Mapping[str, Request]) -> None:
        """These end now; their clients hear of it with the iteration's outputs."""
        self._under_way |= rejected.keys()
        self.undelivered += [(requests[name], rejection) for name, rejection in rejected.items()]

    def is_rejected(self, name: str) -> bool:
        """Whether a request that is being freed ends by rejection."""
        return name in self._under_way

    def freed(self, name: str) -> None:
        """A request has left the engine, for whatever reason."""
        self._under_way.discard(name)

    def answers(self) -> list[tuple[int, EngineCoreOutput]]:
        """The answers of all that were rejected since, each with its client's index."""
        undelivered, self.undelivered = self.undelivered, []
        return [
            (request.client_index, EngineCoreOutput(
                request.request_id, [], finish_reason=FinishReason.ABORT, stop_reason=rejection.as_json()
            ))
            for request, rejection in undelivered
        ]
