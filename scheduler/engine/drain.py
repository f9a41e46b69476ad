"""An engine that drains: what has not begun goes back at once, what has begun runs to its end.

A request has begun once vLLM has computed a token of it, also where it was preempted since. The engine requests of one
HTTP request go back together or not at all: once one of them has begun, the others are served too.

Part of the fence around vLLM's non-public surface (`Request`): `tests/scheduler/test_vllm_seam.py` fails when an
upgrade moves it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from vllm.v1.request import Request

from scheduler.engine.admission_queue import AdmissionQueue
from scheduler.engine.choices import family_of
from scheduler.messages import Ack, Drain
from scheduler.policies import Decision
from scheduler.rejection import Kind, Rejection

STOPPING = "the replica is stopping"
CUT = "the replica stopped before the answer was complete"
_REPLACED_S = 5.0
"""Clients that find no other replica come again when a new one may be there."""


class DrainRule:
    """Which requests an engine sends back, and the admission of the others. `ask` may come from another thread."""

    def __init__(self, queue: AdmissionQueue) -> None:
        self._queue = queue
        self._order: Drain | None = None
        self._recalled: set[str] = set()

    @property
    def asked(self) -> bool:
        """Whether the engine drains."""
        return self._order is not None

    def ask(self, order: Drain) -> Ack:
        """Drain from the next iteration on; there is no way back, and an order to end is never softened."""
        if self._order is None or order.end:
            self._order = order
        return Ack(accepted=True, active_version=-1, reason="draining")

    def decision(self) -> Decision:
        """Admit at once whatever still waits, and let all requests run: none is held for the sake of a threshold."""
        return Decision(admit={name: view.length for name, view in self._queue.views().items()})

    def choose(self, requests: Mapping[str, Request]) -> dict[str, Rejection]:
        """The answers, by id, to the requests that end now."""
        # A pooling request is answered in one iteration, and its answer has no place for a reason.
        open_ones = [one for one in requests.values() if one.pooling_params is None and not one.is_finished()]
        back = {request.request_id: _answer(request, STOPPING, Kind.RECALLED) for request in self._unbegun(open_ones)}
        if self._order is None or not self._order.end:
            return back
        return {request.request_id: _answer(request, CUT, Kind.ENDED) for request in open_ones} | back

    def _unbegun(self, requests: list[Request]) -> list[Request]:
        waiting = [request for request in requests if not _has_begun(request)]
        if not waiting:
            return []
        families = {request.request_id: family_of(request.request_id) for request in requests}
        live = Counter(families.values())
        begun = {families[request.request_id] for request in requests if _has_begun(request)}
        back = []
        for request in waiting:
            family = families[request.request_id]
            if family is not None and family not in self._recalled:
                finished = self._queue.choices.arrived(family) - live[family]
                if family in begun or finished > 0:
                    continue
            back.append(request)
        self._recalled |= {family for request in back if (family := families[request.request_id]) is not None}
        return back


def _has_begun(request: Request) -> bool:
    return bool(request.num_computed_tokens or request.num_preemptions or request.num_output_tokens)


def _answer(request: Request, reason: str, kind: Kind) -> Rejection:
    name = request.request_id
    return Rejection.for_drain_time(reason, _REPLACED_S, family_of(name) or name, kind)
