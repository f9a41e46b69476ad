"""The choices of a request with several (OpenAI's `n` > 1): rejected as a whole, or served as a whole.

vLLM makes one engine request of each choice and sends them one after another. Once one of them has been let through the
gate, its siblings are committed: they wait for their turn like others but cannot be rejected. Once one has been
rejected, so are those that come later. The fence around how vLLM names the choices of a request:
`tests/scheduler/test_vllm_seam.py` fails when an upgrade changes it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass, field

from scheduler.refusal import Refusal

_REMEMBERED = 4096
"""Requests without a choice that waits, of which it is still known whether they were let through or rejected."""


def parent_of(request_id: str) -> str | None:
    """The id of the request that a choice belongs to; None for what is no choice. Source: vLLM's ParentRequest."""
    index, separator, parent = request_id.partition("_")
    return parent or None if separator and index.isascii() and index.isdigit() else None


@dataclass(slots=True)
class _Siblings:
    """held: those that wait at the gate, in the order of their coming."""

    held: dict[str, None] = field(default_factory=dict)
    let_through: bool = False
    rejection: Refusal | None = None


class Choices:
    """What became of the choices that came so far; every method costs O(siblings) at most."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Siblings] = {}
        self._settled: OrderedDict[str, _Siblings] = OrderedDict()
        self._committed: set[str] = set()

    @property
    def committed(self) -> Set[str]:
        """Ids of those that wait and cannot be rejected any more, most since a sibling has been let through."""
        return self._committed

    def hold(self, request_id: str) -> None:
        """A request waits at the gate."""
        parent = parent_of(request_id)
        if parent is None:
            return
        siblings = self._waiting.get(parent)
        if siblings is None:
            siblings = self._waiting[parent] = self._settled.pop(parent, _Siblings())
        siblings.held[request_id] = None
        if siblings.let_through:
            self._committed.add(request_id)

    def commit(self, request_id: str) -> None:
        """A request waits for its turn and cannot be rejected any more, for a reason of its own."""
        self._committed.add(request_id)

    def let_through(self, request_id: str) -> None:
        """A request that waited is let through the gate."""
        siblings = self._waiting.get(parent_of(request_id) or "")
        if siblings is not None:
            siblings.let_through = True
            self._committed.update(siblings.held)
            self.leave(request_id)

    def leave(self, request_id: str) -> None:
        """A request no longer waits."""
        self._committed.discard(request_id)
        parent = parent_of(request_id)
        siblings = self._waiting.get(parent or "")
        if parent is None or siblings is None:
            return
        siblings.held.pop(request_id, None)
        if not siblings.held:
            del self._waiting[parent]
            if siblings.let_through or siblings.rejection:
                self._settled[parent] = siblings
                if len(self._settled) > _REMEMBERED:
                    self._settled.popitem(last=False)

    def reject(self, request_id: str, rejection: Refusal) -> list[str]:
        """Reject a request that waits and is not committed; the ids of all those that end with it, itself included."""
        siblings = self._waiting.get(parent_of(request_id) or "")
        if siblings is None:
            return [request_id]
        siblings.rejection = rejection
        return list(siblings.held)

    def rejection_of(self, request_id: str) -> Refusal | None:
        """With what a sibling of a request that waits was rejected; None when none was."""
        siblings = self._waiting.get(parent_of(request_id) or "")
        return siblings.rejection if siblings else None
