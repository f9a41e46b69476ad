"""The shipped controller's model of a replica inside a simulation, and a record of what it puts in force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from scheduler.fluid_params import FluidParams
from scheduler.messages import Apply, Report
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.thresholds import Thresholds
from scheduler.tuning.replica_model import MIN_FINISHED, WINDOW_S, ReplicaModel, materially_different
from scheduler.tuning.slo import Slo
from simulator.config import SimulationConfig
from simulator.engine.replica import VirtualReplica
from simulator.output.run_files import ControlRow


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
    def targets(self) -> Slo:
        return self.config.slo


class VirtualController:
    """The shipped controller's model of one replica, fed with that replica's own telemetry."""

    def __init__(
        self, replica: VirtualReplica, config: SimulationConfig, time_model: IterationTimeModel, configured: Thresholds,
        record: Passes,
    ) -> None:
        assert replica.headrace is not None
        self._engine, self._index, self._record = replica.headrace, replica.index, record
        self._model = ReplicaModel(_Tuning(config), time_model, configured)

    def one_pass(self) -> None:
        """Collect, solve, push, as `cluster.controller.ControlLoop` does."""
        telemetry = self._engine.telemetry(Report(cursor=self._model.cursor))
        self._model.observe(telemetry)
        proposed = self._model.propose().thresholds
        active = self._engine.active.current().thresholds
        applied = materially_different(proposed, active)
        if applied:
            self._engine.active.offer(Apply(thresholds=proposed.with_version(active.version + 1)))
        self._record.control(self._row(telemetry.clock_s, applied))

    def _row(self, at_s: float, applied: bool) -> ControlRow:
        thresholds = self._engine.active.current().thresholds
        row = ControlRow(
            replica=self._index, at_s=at_s, applied=applied, version=thresholds.version, rate_rps=self._model.rate_rps,
            max_running=thresholds.max_running, reason=thresholds.reason,
        )
        if (params := thresholds.fluid) is None:
            return row
        return row._replace(
            iteration_s=params.iteration_s, full_iteration_s=_full_iteration_s(params),
            prompt_flow_tokens=params.prompt_flow_tokens, mean_output_tokens=params.mean_output_tokens,
            kv_limit_tokens=params.kv_limit_tokens, queue_limit=params.queue_limit,
        )


def _full_iteration_s(params: FluidParams) -> float:
    return params.time_model.iteration_s(params.prompt_flow_tokens, 100.0, float(params.kv_limit_tokens))
