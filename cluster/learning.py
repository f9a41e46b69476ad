"""One pass over the reports of many replicas: every model is updated, siblings are compared, and plans are made."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from cluster.outlook import Outlook
from cluster.tuned import TunedReplica
from replicas.questions import read_from
from scheduler.estimation.pool import Deviation
from scheduler.messages import Telemetry
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.tuning.next_push import NextPush
from scheduler.tuning.replica_model import Proposal
from scheduler.tuning.siblings import Siblings, in_turn

_SEEN_BEFORE_TOLD, _UNSEEN_BEFORE_TOLD = 2, 12
"""Passes in which a replica is slow, or as fast as its siblings again, before an event says so."""
_MOST_KINDS = 64
logger = logging.getLogger(__name__)


class Learned(NamedTuple):
    """What one replica has reported, and what to send it."""

    telemetry: Telemetry
    push: NextPush


class _Report(NamedTuple):
    entry: TunedReplica
    telemetry: Telemetry


@dataclass(slots=True)
class _Told:
    """Of a replica that differs: passes in a row with and without the difference, whether an event has said so, and the
    latest difference."""

    latest: Deviation
    seen: int = 0
    unseen: int = 0
    told: bool = False


class Learning:
    """Of all replicas of an application; blocking, so not on an event loop."""

    def __init__(self, outlook: Outlook) -> None:
        self._outlook = outlook
        self._kinds: dict[Hashable, Siblings] = {}
        self._kind_of: dict[str, Hashable] = {}
        self._told: dict[str, _Told] = {}
        self._passes = 0

    def keep_only(self, names: Collection[str]) -> None:
        """Replicas of other names are gone."""
        self._kind_of = {name: kind for name, kind in self._kind_of.items() if name in names}
        self._told = {name: one for name, one in self._told.items() if name in names}
        of_kind: dict[Hashable, list[str]] = defaultdict(list)
        for name, kind in self._kind_of.items():
            of_kind[kind].append(name)
        for kind, siblings in tuple(self._kinds.items()):
            siblings.keep_only(of_kind[kind])
            if not of_kind[kind] and len(self._kinds) > _MOST_KINDS:
                del self._kinds[kind]

    def learn(
        self, reports: Mapping[str, tuple[TunedReplica, bytes]], at_unix_s: float, now_s: float
    ) -> dict[str, Learned | Exception]:
        """What to send each replica that has reported, or why there is nothing. at_unix_s: the beginning of the control
        cycle; now_s: monotonic."""
        found: dict[str, Learned | Exception] = {}
        read: dict[str, _Report] = {}
        before: dict[str, IterationTimeModel | None] = {}
        waiting, touched = dict[str, Proposal](), set[Siblings]()
        for name, (entry, text) in reports.items():  # each at once, so that no two reports of all replicas are kept
            try:
                report = _Report(entry, read_from(entry.engine, text, Telemetry))
                before[name], read[name] = entry.tuner.time_model, report
                with self._outlook.modelling:
                    proposal = entry.take(report.telemetry)
                    if proposal is None:
                        touched.add(self._taken(name, report, now_s))
                    else:
                        waiting[name] = proposal
            except Exception as error:
                found[name] = error
        for siblings in touched:
            try:
                with self._outlook.modelling:
                    siblings.settle(now_s)
            except Exception:  # each goes by its own estimates then
                logger.exception("replicas of one kind cannot be compared")
        for name in in_turn(read.keys() - found.keys(), self._passes):
            try:
                found[name] = self._learned(name, read[name], waiting.get(name), now_s)
            except Exception as error:
                found[name] = error
        for name, report in read.items():  # a report that the model cannot read is shown all the same
            try:
                self._remember(name, report, before[name], at_unix_s)
            except Exception:
                logger.exception("a report of %s is not shown", name)
        self._passes += 1
        return found

    def _taken(self, name: str, report: _Report, now_s: float) -> Siblings:
        """The siblings of a replica, who know its report now."""
        model = report.entry.tuner.model
        assert model is not None
        siblings = self._siblings(name, report)
        siblings.take(name, model, now_s)
        return siblings

    def _learned(self, name: str, report: _Report, waiting: Proposal | None, now_s: float) -> Learned:
        tuner = report.entry.tuner
        if waiting is None:
            with self._outlook.modelling:
                waiting = tuner.propose(partial(self._kinds[self._kind_of[name]].propose, name))
        return Learned(report.telemetry, tuner.next_push(report.telemetry, waiting, now_s))

    def _siblings(self, name: str, report: _Report) -> Siblings:
        """The replicas of one deployment with the same engine limits; of the KV cache, even equal accelerators have a
        few blocks more or less. Other accelerators in one deployment show in their iteration times."""
        limits = replace(report.telemetry.limits, kv_capacity_tokens=0)
        kind = self._kind_of[name] = (report.entry.engine.deployment, limits)
        if kind not in self._kinds:
            self._kinds[kind] = Siblings(limits.max_model_len)
        return self._kinds[kind]

    def _remember(self, name: str, report: _Report, before: IterationTimeModel | None, at_unix_s: float) -> None:
        tuner = report.entry.tuner
        self._outlook.history.observe(
            name, report.entry.engine.model_id, at_unix_s, report.telemetry, targets=tuner.targets, predicted_by=before,
            shown=tuner.planned,
        )

    @property
    def deviations(self) -> dict[str, Deviation]:
        """The replicas of another speed than their siblings, by name."""
        found: dict[str, Deviation] = {}
        for siblings in tuple(self._kinds.values()):
            found |= siblings.deviations
        return found

    def news(self) -> dict[str, str]:
        """Once after each pass: the replicas that have become slow or fast beside their siblings, or are no more, and
        which of these."""
        found, said = self.deviations, {}
        for name, deviation in found.items():
            one = self._told.setdefault(name, _Told(deviation))
            one.latest, one.seen, one.unseen = deviation, one.seen + 1, 0
            if not one.told and one.seen >= _SEEN_BEFORE_TOLD:
                one.told, said[name] = True, deviation.in_words
        for name in self._told.keys() - found.keys():
            one = self._told[name]
            one.seen, one.unseen = 0, one.unseen + 1
            if one.told and one.unseen >= _UNSEEN_BEFORE_TOLD:
                said[name] = "runs as fast as its siblings again"
            if not one.told or name in said:
                del self._told[name]
        return said
