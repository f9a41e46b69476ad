"""The shipped controller's model of a replica inside a simulation, and a record of what it puts in force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from scheduler.law import ServiceTimeLaw
from scheduler.messages import Apply, Report
from scheduler.pace import Pace
from scheduler.replica_model import MIN_FINISHED, WINDOW_S, ReplicaModel, materially_different
from scheduler.targets import Targets
from scheduler.thresholds import Thresholds
from simulator.config import SimulationConfig
from simulator.replica import VirtualReplica
from simulator.results import ControlRow


class Passes(Protocol):
    """Where the record goes; `RunWriter` is one."""

    def control(self, row: ControlRow) -> None: ...


@dataclass(frozen=True)
class _Tuning:
    """What the controller is told, by its own defaults; thresholds do not lapse, as it never falls silent."""

    config: SimulationConfig
    window_s: float = WINDOW_S
    min_finished: int = MIN_FINISHED
    validity_s: float = 1e9

    @property
    def overflow_probability(self) -> float:
        return self.config.overflow_probability

    @property
    def targets(self) -> Targets:
        return self.config.slo.promised


class VirtualController:
    """The shipped controller's model of one replica, fed with that replica's own telemetry."""

    def __init__(
        self, replica: VirtualReplica, config: SimulationConfig, law: ServiceTimeLaw, configured: Thresholds,
        record: Passes,
    ) -> None:
        assert replica.headrace is not None
        self._engine, self._index, self._record = replica.headrace, replica.index, record
        self._model = ReplicaModel(_Tuning(config), law, configured)

    def one_pass(self) -> None:
        """Collect, solve, push, as `cluster.controller.ControlLoop` does."""
        telemetry = self._engine.telemetry(Report(cursor=self._model.cursor))
        self._model.observe(telemetry)
        proposed = self._model.propose().thresholds
        in_force = self._engine.in_force.current().thresholds
        applied = materially_different(proposed, in_force)
        if applied:
            self._engine.in_force.offer(Apply(thresholds=proposed.with_version(in_force.version + 1)))
        self._record.control(self._row(telemetry.clock_s, applied))

    def _row(self, at_s: float, applied: bool) -> ControlRow:
        thresholds = self._engine.in_force.current().thresholds
        row = ControlRow(
            replica=self._index, at_s=at_s, applied=applied, version=thresholds.version, rate_rps=self._model.rate_rps,
            max_in_service=thresholds.max_in_service, reason=thresholds.reason,
        )
        if (pace := thresholds.pace) is None:
            return row
        return row._replace(
            iteration_s=pace.iteration_s, full_iteration_s=_full_iteration_s(pace),
            prompt_flow_tokens=pace.prompt_flow_tokens, mean_output_tokens=pace.mean_output_tokens,
            kv_limit_tokens=pace.kv_limit_tokens, queue_requests=pace.queue_requests,
        )


def _full_iteration_s(pace: Pace) -> float:
    return pace.law.iteration_s(pace.prompt_flow_tokens, 100.0, float(pace.kv_limit_tokens))
