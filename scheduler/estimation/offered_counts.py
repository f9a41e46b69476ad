"""How many requests engines were offered between two looks at their counters."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from scheduler.messages import Counters

_GONE_KEPT = 1024


class OfferedCounts:
    """Totals of a changing set of engines.

    Of an engine that was there when counting began, the first report only says where it begins, as its whole life would
    be counted else. All that one has which came later, or began again, is new. Requests that an engine gives back to be
    served elsewhere are counted there.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, int]] = {}
        self._older: set[str] | None = None

    def begin(self, engines: Collection[str]) -> None:
        """Counting begins, unless it has; these engines are there."""
        if self._older is None:
            self._older = set(engines)

    def since_last(self, engines: Mapping[str, tuple[str, Counters]]) -> int:
        """New requests, rejected ones too. engines: by name the engine's id, which a restart changes, and its counters;
        one that is missing has said nothing, and is counted when it does."""
        offered, older = 0, self._older or set()
        for name, (engine_id, counters) in engines.items():
            total = counters.arrivals - counters.recalled
            known_id, known = self._seen.get(name, (engine_id, total) if name in older else ("", 0))
            offered += max(0, total - known) if known_id == engine_id else total
            self._seen.pop(name, None)  # the latest last
            self._seen[name] = engine_id, total
        return offered

    def keep(self, engines: Collection[str]) -> None:
        """Forget all but these, and the latest of those that are gone: one that comes back has counted on."""
        gone = [name for name in self._seen if name not in engines]
        for name in gone[: max(0, len(gone) - _GONE_KEPT)]:
            del self._seen[name]
