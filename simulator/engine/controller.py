"""The shipped controller's model of a replica inside a simulation, and a record of its control cycles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scheduler.messages import Apply, Report, Telemetry
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.thresholds import Thresholds
from scheduler.tuning.next_push import next_push
from scheduler.tuning.replica_model import Proposal, ReplicaModel
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.siblings import Siblings
from simulator.config import SimulationConfig
from simulator.engine.replica import VirtualReplica
from simulator.output.rows import ControlRow

_NO_LAPSE_S = 1e9
"""The simulated controller never stops, so thresholds do not lapse."""


class ControlSink(Protocol):
    """Receives the control cycles; `RunWriter` is one."""

    def control(self, row: ControlRow) -> None: ...


def one_cycle(controllers: Sequence[VirtualController], siblings: Siblings, now_s: float) -> None:
    """Collect, solve, push, as `cluster.controller.ControlLoop` does; all replicas are of one kind."""
    reports = [one.observe() for one in controllers]
    siblings.keep_only([one.name for one in controllers])
    if len(controllers) > 1:  # one replica has nothing to share
        for one in controllers:
            siblings.take(one.name, one.model, now_s)
        siblings.settle(now_s)
    for one, telemetry in zip(controllers, reports, strict=True):
        one.push(telemetry, siblings.propose(one.name, one.model))


class VirtualController:
    """The shipped controller's model of one replica, `model`, fed with that replica's own telemetry."""

    def __init__(
        self, replica: VirtualReplica, config: SimulationConfig, time_model: IterationTimeModel, configured: Thresholds,
        record: ControlSink,
    ) -> None:
        assert replica.headrace is not None
        self._engine, self._index, self._record = replica.headrace, replica.index, record
        self.name = str(replica.index)
        settings = TuningSettings(
            overflow_probability=config.overflow_probability, validity_s=_NO_LAPSE_S, targets=config.slo
        )
        self.model = ReplicaModel(settings, time_model, configured)

    def observe(self) -> Telemetry:
        """Collect."""
        telemetry = self._engine.telemetry(Report(cursor=self.model.cursor))
        self.model.observe(telemetry)
        return telemetry

    def push(self, telemetry: Telemetry, proposal: Proposal) -> None:
        """Push what was solved."""
        push = next_push(telemetry, proposal, pushed_s_ago=0.0, validity_s=_NO_LAPSE_S)
        if push.thresholds is not None:
            self._engine.active.offer(Apply(thresholds=push.thresholds))
        self._record.control(self._row(telemetry.clock_s, push.thresholds is not None))

    def _row(self, at_s: float, applied: bool) -> ControlRow:
        thresholds = self._engine.active.current().thresholds
        row = ControlRow(
            replica=self._index, at_s=at_s, applied=applied, version=thresholds.version, rate_rps=self.model.rate_rps,
            max_running=thresholds.max_running, reason=thresholds.reason,
        )
        if (params := thresholds.fluid) is None:
            return row
        return row._replace(
            iteration_s=params.iteration_s, full_iteration_s=params.time_model.iteration_s(*params.full_batch),
            prompt_flow_tokens=params.prompt_flow_tokens, mean_output_tokens=params.survival.mean,
            kv_limit_tokens=params.kv_limit_tokens, queue_limit=params.queue_limit,
        )
