"""Where the records are: turns an engine's telemetry into a report whose size does not grow with its traffic."""

from __future__ import annotations

from dataclasses import replace

from scheduler.digest import Digest
from scheduler.messages import Telemetry
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.settings import LiveSettings
from scheduler.thresholds import Thresholds
from scheduler.tuning.engine_tuner import EngineTuner
from scheduler.tuning.settings import TuningSettings


class Digester:
    """What one engine has seen, as its controller would know it. cursor: the records read so far."""

    def __init__(self) -> None:
        self._tuner: EngineTuner | None = None

    @property
    def cursor(self) -> int:
        """Where the next records begin."""
        return 0 if self._tuner is None else self._tuner.cursor

    @staticmethod
    def can_digest(telemetry: Telemetry) -> bool:
        """Whether the policy plans with what a digest holds; the others need the records."""
        return _in_force(telemetry).policy == "fluid"

    def digested(
        self, telemetry: Telemetry, settings: TuningSettings, profiled: IterationTimeModel | None
    ) -> Telemetry:
        """The report with a digest in place of its records. settings, profiled: the controller's.

        A report that cannot be read raises, and the next one is read anew.
        """
        configured = _in_force(telemetry)
        if telemetry.settings is not None:
            settings = LiveSettings.reported(telemetry.settings).tuning(settings)
        if self._tuner is None:
            self._tuner = EngineTuner(settings, profiled, configured)
        self._tuner.profiled = profiled
        self._tuner.follow(settings, configured)
        self._tuner.take(telemetry)
        model = self._tuner.model
        digest = Digest(measuring=self._tuner.measuring) if model is None else model.digest()
        return replace(telemetry, iterations=(), arrivals=(), finished=(), running=(), delivered=(), digest=digest)


def _in_force(telemetry: Telemetry) -> Thresholds:
    if telemetry.settings is None:
        return telemetry.thresholds
    return LiveSettings.reported(telemetry.settings).thresholds
