"""`wait`: WAIT, for requests whose output length is known (arXiv 2504.11320, Algorithm 1).

Decides: type j enters in groups, when n_j of its requests wait. In `strict` mode only types with a full group make
progress, at most n_j requests from each stage; if no type has one, all wait for the next arrival. In `serving` mode
running requests always go on, an incomplete group enters after `max_hold_s`, and an idle engine admits what is waiting.
Requests of unknown length follow the segments, as under `nested_wait`, if any are set. Requests of a type without n_j
enter at once and always run, in either mode.
Parameters: `types` (n_j and length bounds, first match wins), `segments` for unknown lengths, `max_running`.
When not to use it: at light load, where holding a group back only adds its hold to the time to first token; and
whenever clients declare no lengths.
"""

from __future__ import annotations

from collections import Counter

from scheduler.policies.base import Decision, Policy, Snapshot
from scheduler.policies.segments import Segments
from scheduler.thresholds import UNKNOWN_TYPE, Thresholds


class Wait(Policy):
    """Admission by groups of n_j per type."""

    name = "wait"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._n = {entry.name: entry.n for entry in thresholds.types}
        self._segments = Segments(thresholds)

    def classify(self, prompt_tokens: int, known_output_tokens: int | None) -> str:
        """The first type whose bounds include the request; unknown if its output length is unknown or no type fits."""
        if known_output_tokens is None:
            return UNKNOWN_TYPE
        for entry in self.thresholds.types:
            prompt_fits = entry.max_prompt_tokens is None or prompt_tokens <= entry.max_prompt_tokens
            output_fits = entry.max_output_tokens is None or known_output_tokens <= entry.max_output_tokens
            if prompt_fits and output_fits:
                return entry.name
        return UNKNOWN_TYPE

    def decide(self, snapshot: Snapshot) -> Decision:
        """Admit from every type with a full group (or, in serving mode, with a hold that is over)."""
        if self.strict:
            return self._decide_strictly(snapshot)
        slots = self.free_slots(snapshot)
        admit: dict[str, int] = {}
        # Oldest type first, so that the last free slots go to the longest wait.
        for type_name, view in sorted(snapshot.waiting.items(), key=lambda item: item[1].oldest_since_s):
            at_once = snapshot.idle or self.hold_is_over(view, snapshot)
            if type_name in self._n:
                able = min(view.length, slots)
                n = self._n[type_name] or able
                entering = min(n, able) if able >= n or at_once else 0
            else:
                entering = self._segments.entering(view.length, slots, at_once=at_once)
            if entering:
                admit[type_name] = entering
                slots -= entering
        if UNKNOWN_TYPE not in snapshot.waiting:
            self._segments.entering(0, slots, at_once=False)
        return Decision(admit, self._segments.sit_out(snapshot, entering=bool(admit)))

    def _decide_strictly(self, snapshot: Snapshot) -> Decision:
        waiting = {name: view.length for name, view in snapshot.waiting.items()}
        open_types = {name for name, n in self._n.items() if n is None}
        known = {name: n for name, n in self._n.items() if n is not None and waiting.get(name, 0) >= n}
        unknown_admitted, sit_out = self._segments.decide_strictly(snapshot)
        at_stage: Counter[tuple[str, int]] = Counter()
        for request in snapshot.running:
            if request.type_name not in self._n or request.type_name in open_types or request.stage == 0:
                continue
            place = (request.type_name, request.stage)
            at_stage[place] += 1
            if at_stage[place] > known.get(request.type_name, 0):
                sit_out.add(request.request_id)
        known |= {name: waiting[name] for name in sorted(open_types & waiting.keys())}
        if unknown_admitted:
            known[UNKNOWN_TYPE] = unknown_admitted
        slots, admit = self.free_slots(snapshot), {}
        for name, count in known.items():
            admit[name] = min(count, slots)
            slots -= admit[name]
        return Decision(admit, sit_out)
