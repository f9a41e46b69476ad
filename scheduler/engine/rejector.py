"""The rejections of an engine, and the outputs that carry them to the clients.

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
from scheduler.rejection import Kind, Rejection


class Rejector:
    """Rejections of one engine.

    audit_share: share of the requests to be rejected that are served anyway. never: ids that are not rejected.
    undelivered: rejections whose output has not been sent yet.
    """

    def __init__(self, admission_queue: AdmissionQueue, lives: Mapping[str, Life], audit_share: float) -> None:
        self._queue, self._lives, self._audit_share = admission_queue, lives, audit_share
        self._under_way: dict[str, Rejection] = {}
        self.undelivered: list[tuple[Request, Rejection]] = []
        self.never: set[str] = set()

    def choose(self, requests: list[Request], reason: str, drain_s: float) -> dict[str, Rejection]:
        """The rejections of waiting requests and their siblings, by id.

        Siblings of a request that runs already are released instead.
        """
        rejected: dict[str, Rejection] = {}
        for request in requests:
            name = request.request_id
            if name in self.never or self._is_audited(name):
                self._queue.choices.commit(name)  # it keeps waiting for its turn
            elif name in self._queue.choices.committed:
                self._queue.let_through(request)
            elif name not in rejected:
                rejection = Rejection.for_drain_time(reason, drain_s, family_of(name) or name)
                rejected |= dict.fromkeys(self._queue.choices.reject(name, rejection), rejection)
        return rejected

    def _is_audited(self, name: str) -> bool:
        """Whether this request is served although it would be rejected; drawn by its id, so that reruns agree."""
        if parent_of(name) is not None or name not in self._lives:
            return False
        drawn = int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=8, key=b"audit").digest())
        self._lives[name].audited = drawn < self._audit_share * 2**64
        return self._lives[name].audited

    def begin(self, rejected: Mapping[str, Rejection], requests: Mapping[str, Request]) -> None:
        """Note the requests that end now; the iteration's outputs carry their rejections."""
        self._under_way |= rejected
        self.undelivered += [(requests[name], rejection) for name, rejection in rejected.items()]

    def kind_of(self, name: str) -> Kind | None:
        """How a request being freed was turned away; None for any other."""
        rejection = self._under_way.get(name)
        return rejection.kind if rejection else None

    def reason_of(self, name: str) -> str:
        """Why a request being freed was turned away; empty for any other."""
        rejection = self._under_way.get(name)
        return rejection.reason if rejection else ""

    def freed(self, name: str) -> None:
        """A request has left the engine, for whatever reason."""
        self._under_way.pop(name, None)

    def answers(self) -> list[tuple[int, EngineCoreOutput]]:
        """The outputs of the requests rejected since the last call, each with its client's index."""
        undelivered, self.undelivered = self.undelivered, []
        return [
            (request.client_index, EngineCoreOutput(
                request.request_id, [], finish_reason=FinishReason.ABORT, stop_reason=rejection.as_json()
            ))
            for request, rejection in undelivered
        ]
