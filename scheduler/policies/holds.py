"""Holds at output-length boundaries: the start of each request's hold, and the boundaries that it has passed."""

from __future__ import annotations

from collections.abc import Set


class Holds:
    """The holds of requests at a boundary; a boundary has the number of the segment behind it."""

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}
        self._passed: dict[str, int] = {}

    def stands(self, name: str, now_s: float) -> None:
        """A request is held now; its hold began at the first such call."""
        self._since_s.setdefault(name, now_s)

    def since_s(self, name: str) -> float:
        """Clock second at which a hold began; requests go on in this order."""
        return self._since_s[name]

    def is_over(self, name: str, now_s: float, max_hold_s: float) -> bool:
        """Whether a request has been held for `max_hold_s`."""
        return now_s - self._since_s[name] >= max_hold_s

    def let_over(self, name: str, segment: int) -> None:
        """A request goes on into a segment."""
        self._passed[name] = segment

    def has_passed(self, name: str, segment: int) -> bool:
        """Whether a request at a segment's entry may go on into the segment."""
        return self._passed.get(name) == segment

    def forget_all_but(self, present: Set[str]) -> None:
        """Forget all requests that are not at a boundary now."""
        self._since_s = {name: since for name, since in self._since_s.items() if name in present}
        self._passed = {name: segment for name, segment in self._passed.items() if name in present}
