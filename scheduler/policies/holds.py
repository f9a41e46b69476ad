"""Holds at output-length boundaries: since when each request stands at one, and which ones it has been let over."""

from __future__ import annotations

from collections.abc import Set


class Holds:
    """Of the requests that stand at a boundary; a segment's number names the boundary before it."""

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}
        self._passed: dict[str, int] = {}

    def stands(self, name: str, now_s: float) -> None:
        """A request is held now; its hold began when it was first seen there."""
        self._since_s.setdefault(name, now_s)

    def since_s(self, name: str) -> float:
        """When a hold began: the order in which requests go on."""
        return self._since_s[name]

    def is_over(self, name: str, now_s: float, max_hold_s: float) -> bool:
        """Whether a request has been held for so long."""
        return now_s - self._since_s[name] >= max_hold_s

    def let_over(self, name: str, segment: int) -> None:
        """A request goes on into a segment."""
        self._passed[name] = segment

    def has_passed(self, name: str, segment: int) -> bool:
        """Whether a request that stands at a segment's entry has been let in already."""
        return self._passed.get(name) == segment

    def forget_all_but(self, present: Set[str]) -> None:
        """Keep what is known of those that stand at a boundary now."""
        self._since_s = {name: since for name, since in self._since_s.items() if name in present}
        self._passed = {name: segment for name, segment in self._passed.items() if name in present}
