"""The engine requests of one HTTP request: rejected as a whole, or served as a whole.

vLLM makes one engine request of each prompt of a completion and of each choice (OpenAI's `n` > 1), and sends them one
after another. Once one of them has been let through the gate, its siblings are committed: they wait for their turn like
others but cannot be rejected. Once one has been rejected, so are those that come later. The fence around how vLLM names
them: `tests/scheduler/test_vllm_seam.py` fails when an upgrade changes it.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass, field

from scheduler.rejection import Rejection

_REMEMBERED = 4096
"""HTTP requests none of which waits, of which it is still known whether they were let through or rejected."""


def parent_of(request_id: str) -> str | None:
    """The id of the request that a choice belongs to; None for what is no choice. Source: vLLM's ParentRequest."""
    index, separator, parent = request_id.partition("_")
    return parent or None if separator and index.isascii() and index.isdigit() else None


_ONE_OF_SEVERAL = re.compile(r"((?:cmpl|transcribe|translate)-.+)-[0-9]+-[0-9a-f]{8}", re.DOTALL)


def family_of(request_id: str) -> str | None:
    """What all engine requests of one HTTP request have in common; None for one that can have no sibling.

    Source: vLLM numbers the prompts of a completion (and the pieces of a recording) behind the HTTP request's own id,
    `cmpl-ID-0`, `cmpl-ID-1`, and puts eight random digits behind each.
    """
    parent = parent_of(request_id)
    numbered = _ONE_OF_SEVERAL.fullmatch(parent or request_id)
    return numbered[1] if numbered else parent


@dataclass(slots=True)
class _Siblings:
    """held: those that wait at the gate, in the order of their coming; places: which prompts and choices have come."""

    family: str
    held: dict[str, None] = field(default_factory=dict)
    places: set[str] = field(default_factory=set)
    let_through: bool = False
    rejection: Rejection | None = None


class Choices:
    """What became of the siblings that came so far; every method costs O(siblings) at most."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Siblings] = {}
        self._settled: OrderedDict[str, _Siblings] = OrderedDict()
        self._siblings_of: dict[str, _Siblings] = {}
        self._committed: set[str] = set()

    @property
    def committed(self) -> Set[str]:
        """Ids of those that wait and cannot be rejected any more, most since a sibling has been let through."""
        return self._committed

    def hold(self, request_id: str) -> None:
        """A request waits at the gate."""
        family = family_of(request_id)
        if family is None or request_id in self._siblings_of:
            return
        place = request_id.rpartition("-")[0] or request_id
        siblings = self._waiting.get(family)
        if siblings is None:
            siblings = self._settled.pop(family, _Siblings(family))
        if place in siblings.places:  # a client that uses the id of an earlier request again
            siblings = _Siblings(family)
        siblings.places.add(place)
        siblings.held[request_id] = None
        self._waiting[family] = self._siblings_of[request_id] = siblings
        if siblings.let_through:
            self._committed.add(request_id)

    def commit(self, request_id: str) -> None:
        """A request waits for its turn and cannot be rejected any more, for a reason of its own; nor its siblings."""
        self._committed.add(request_id)
        self._commit_siblings(request_id)

    def let_through(self, request_id: str) -> None:
        """A request that waited is let through the gate."""
        self._commit_siblings(request_id)
        self.leave(request_id)

    def _commit_siblings(self, request_id: str) -> None:
        siblings = self._siblings_of.get(request_id)
        if siblings is not None:
            siblings.let_through = True
            self._committed.update(siblings.held)

    def leave(self, request_id: str) -> None:
        """A request no longer waits."""
        self._committed.discard(request_id)
        siblings = self._siblings_of.pop(request_id, None)
        if siblings is None:
            return
        del siblings.held[request_id]
        if siblings.held or self._waiting.get(siblings.family) is not siblings:
            return
        del self._waiting[siblings.family]
        if siblings.let_through or siblings.rejection:
            self._settled[siblings.family] = siblings
            if len(self._settled) > _REMEMBERED:
                self._settled.popitem(last=False)

    def reject(self, request_id: str, rejection: Rejection) -> list[str]:
        """Reject a request that waits and is not committed; the ids of all those that end with it, itself included."""
        siblings = self._siblings_of.get(request_id)
        if siblings is None:
            return [request_id]
        siblings.rejection = rejection
        return list(siblings.held)

    def rejection_of(self, request_id: str) -> Rejection | None:
        """With what a sibling of a request that waits was rejected; None when none was."""
        siblings = self._siblings_of.get(request_id)
        return siblings.rejection if siblings else None
