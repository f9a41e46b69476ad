"""How many requests engines were offered between two looks at their counters."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from scheduler.messages import Counters


class OfferedCounts:
    """Totals of a changing set of engines.

    An engine's first report only says where counting begins, as a watcher that starts anew would else count its whole
    life. Requests that an engine gives back to be served elsewhere are counted there.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, int]] = {}

    def since_last(self, engines: Mapping[str, tuple[str, Counters]]) -> int:
        """New requests, rejected ones too. engines: by name the engine's id, which a restart changes, and its counters;
        one that is missing has said nothing, and is counted when it does."""
        offered = 0
        for name, (engine_id, counters) in engines.items():
            total = counters.arrivals - counters.recalled
            known_id, known = self._seen.get(name, ("", 0))
            if known_id == engine_id:
                offered += max(0, total - known)
            self._seen[name] = engine_id, total
        return offered

    def keep(self, engines: Collection[str]) -> None:
        """Forget all but these."""
        self._seen = {name: seen for name, seen in self._seen.items() if name in engines}
