"""The engine requests of one HTTP request (siblings), which are all rejected or all served.

vLLM makes one engine request of each prompt of a completion and of each choice (OpenAI's `n` > 1), and sends them one
after another. Once one of them is released, its siblings are committed: they wait for their turn but cannot be
rejected. Once one is rejected, so are its siblings that arrive later. vLLM's naming of siblings is non-public:
`tests/scheduler/test_vllm_seam.py` fails when an upgrade changes it.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass, field

from scheduler.rejection import Rejection

_REMEMBERED = 4096
"""Most HTTP requests without a waiting sibling whose outcome (released or rejected) is remembered."""


def parent_of(request_id: str) -> str | None:
    """The id of the request that a choice belongs to; None if `request_id` is no choice. Source: vLLM's ParentRequest.
    """
    index, separator, parent = request_id.partition("_")
    return parent or None if separator and index.isascii() and index.isdigit() else None


_ONE_OF_SEVERAL = re.compile(r"((?:cmpl|transcribe|translate)-.+)-[0-9]+-[0-9a-f]{8}", re.DOTALL)


def family_of(request_id: str) -> str | None:
    """The id shared by all engine requests of one HTTP request; None for a request that can have no sibling.

    Source: vLLM numbers the prompts of a completion (and the pieces of a recording) behind the HTTP request's own id,
    `cmpl-ID-0`, `cmpl-ID-1`, and puts eight random digits behind each.
    """
    parent = parent_of(request_id)
    numbered = _ONE_OF_SEVERAL.fullmatch(parent or request_id)
    return numbered[1] if numbered else parent


@dataclass(slots=True)
class _Siblings:
    """held: siblings in the admission queue, by arrival; places: the prompts and choices that have arrived."""

    family: str
    held: dict[str, None] = field(default_factory=dict)
    places: set[str] = field(default_factory=set)
    let_through: bool = False
    rejection: Rejection | None = None


class Choices:
    """The outcome of the siblings that have arrived; every method costs O(siblings) at most."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Siblings] = {}
        self._settled: OrderedDict[str, _Siblings] = OrderedDict()
        self._siblings_of: dict[str, _Siblings] = {}
        self._committed: set[str] = set()

    @property
    def committed(self) -> Set[str]:
        """Ids of waiting requests that can no longer be rejected, mostly because a sibling was released."""
        return self._committed

    def hold(self, request_id: str) -> None:
        """A request enters the admission queue."""
        family = family_of(request_id)
        if family is None or request_id in self._siblings_of:
            return
        place = request_id.rpartition("-")[0] or request_id
        siblings = self._waiting.get(family)
        if siblings is None:
            siblings = self._settled.pop(family, _Siblings(family))
        if place in siblings.places:  # a client reuses the id of an earlier request
            siblings = _Siblings(family)
        siblings.places.add(place)
        siblings.held[request_id] = None
        self._waiting[family] = self._siblings_of[request_id] = siblings
        if siblings.let_through:
            self._committed.add(request_id)

    def commit(self, request_id: str) -> None:
        """Exempt a waiting request and its siblings from rejection."""
        self._committed.add(request_id)
        self._commit_siblings(request_id)

    def let_through(self, request_id: str) -> None:
        """A waiting request is released."""
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
        """Reject a waiting, uncommitted request; returns the ids of all siblings that end with it, itself included."""
        siblings = self._siblings_of.get(request_id)
        if siblings is None:
            return [request_id]
        siblings.rejection = rejection
        return list(siblings.held)

    def arrived(self, family: str) -> int:
        """Siblings of a family that have arrived, finished ones too; 0 once it is forgotten."""
        siblings = self._waiting.get(family) or self._settled.get(family)
        return len(siblings.places) if siblings else 0

    def rejection_of(self, request_id: str) -> Rejection | None:
        """The rejection of a waiting request's sibling; None if no sibling was rejected."""
        siblings = self._siblings_of.get(request_id)
        return siblings.rejection if siblings else None
