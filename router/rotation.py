"""Replicas out of rotation, and the replica that each request of this process is at.

One record for a process: Serve makes the request routers and the ingress apart, and runs routers on a thread of their
own. A replica that failed gets nothing new from the moment one request failed there, however free it looks, until it is
replaced, or for `OUT_FOR_S` if Serve still lists it then. A replica that only failed a request that then succeeded
elsewhere is a last resort for as long. No Ray in here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

OUT_FOR_S = 30.0
_Replica = TypeVar("_Replica")


@dataclass(slots=True)
class Trail:
    """The way of one request: the replica it is at, how to cancel it there, and where it has failed before."""

    replica: str | None = None
    cancel: Callable[[], None] | None = None
    tried: set[str] = field(default_factory=set)


class Rotation:
    """Which replicas a request may go to. Replicas are named by Serve's unique ids; safe from several threads.

    out_for_s: seconds until a replica that Serve still lists gets requests again. `ingresses`: how many of them, this
    one included, send to the same replicas.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, out_for_s: float = OUT_FOR_S) -> None:
        self.out_for_s = out_for_s
        self.ingresses = 1
        self._clock = clock
        self._out: dict[str, float] = {}
        self._doubted: dict[str, float] = {}
        self._trails: dict[str, Trail] = {}
        self._again: set[str] = set()
        self._lock = threading.Lock()

    def take_out(self, replica: str) -> None:
        """Nothing new goes to it: it failed, or it leaves."""
        with self._lock:
            self._out[replica] = self._clock() + self.out_for_s

    def doubt(self, replica: str) -> None:
        """It gets something new only when every other is out."""
        with self._lock:
            self._doubted[replica] = self._clock() + self.out_for_s

    def out(self) -> set[str]:
        """The replicas that nothing new goes to now."""
        with self._lock:
            now_s = self._clock()
            for record in (self._out, self._doubted):
                for replica in [name for name, until_s in record.items() if until_s <= now_s]:
                    del record[replica]
            return set(self._out)

    def offered(
        self, replicas: Sequence[_Replica], name: Callable[[_Replica], str], request_id: str
    ) -> list[_Replica]:
        """The replicas that a request may go to now: of those not out, the ones without a failure of this or another
        request; if there is none, all that are not out."""
        out = self.out()
        with self._lock:
            trail = self._trails.get(request_id)
            avoided = self._doubted.keys() | (trail.tried if trail else set())
        possible = [replica for replica in replicas if name(replica) not in out]
        return [replica for replica in possible if name(replica) not in avoided] or possible

    @contextlib.contextmanager
    def following(self, request_id: str) -> Iterator[Trail]:
        """The trail of a request, while it is served."""
        trail = Trail()
        with self._lock:
            self._trails[request_id] = trail
        try:
            yield trail
        finally:
            with self._lock:
                self._trails.pop(request_id, None)
                self._again.discard(request_id)

    def routed(self, request_id: str, replica: str, cancel: Callable[[], None]) -> None:
        """A request has been accepted by a replica."""
        with self._lock:
            trail = self._trails.get(request_id)
            if trail is not None:
                trail.replica, trail.cancel = replica, cancel
                self._again.discard(request_id)

    def try_again(self, request_id: str) -> None:
        """A request is about to be sent once more, away from where it has been."""
        with self._lock:
            trail = self._trails[request_id]
            if trail.replica is not None:
                trail.tried.add(trail.replica)
            trail.replica = trail.cancel = None
            self._again.add(request_id)

    @property
    def tries_again(self) -> bool:
        """Whether a request is being sent once more, so that it matters which replica it gets."""
        return bool(self._again)


ROTATION = Rotation()
"""The record of this process."""
