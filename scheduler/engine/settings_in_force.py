"""The settings of one engine that may change while it runs, and what follows from a change.

New settings give new configured thresholds: active at once unless the active ones are pinned, and the ones to which
pushed thresholds lapse. The channel's thread changes them; the scheduler reads them at the start of an iteration.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from scheduler.engine.active_thresholds import ActiveThresholds
from scheduler.messages import Ack, Configure
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.profiles import load_profile
from scheduler.policies import Policy
from scheduler.settings import LiveSettings, SchedulerSettings
from scheduler.support import EngineSetup
from scheduler.thresholds import EngineLimits, Thresholds
from scheduler.tuning.slo import NO_SLO, Slo, is_reachable
from scheduler.tuning.solve import cold_thresholds


class SettingsInForce:
    """The settings and, in `active`, the thresholds that follow from them or were pushed.

    setup: the engine's other settings. estimated: the iteration-time model where the settings name no profile; None:
    there is none. Raises as `ActiveThresholds`.
    """

    def __init__(
        self, settings: SchedulerSettings, limits: EngineLimits, clock: Callable[[], float], setup: EngineSetup,
        policy_of: Callable[[Thresholds], Policy], estimated: IterationTimeModel | None = None,
    ) -> None:
        self._estimated = estimated
        self.settings: LiveSettings = settings.live
        self._limits, self._setup, self._revision = limits, setup, 0
        self._lock = threading.Lock()
        self.active = ActiveThresholds(
            configured_thresholds(self.settings, limits, estimated), limits, clock, allow_strict=settings.allow_strict,
            setup=setup, policy_of=policy_of,
        )

    @property
    def targets(self) -> Slo:
        """The latency targets by which completed requests are judged.

        The settings' own; without any, those of the active fluid parameters.
        """
        if self.settings.targets != NO_SLO:
            return self.settings.targets
        params = self.active.current().thresholds.fluid
        return NO_SLO if params is None else Slo(params.ttft_s, params.tpot_s, params.latency_s)

    def configure(self, asked: Configure) -> Ack:
        """Replace the settings, or answer why not; nothing changes then. The same settings again change nothing.

        A message that an earlier or equal revision carries is stale.
        """
        with self._lock:
            try:
                wanted = LiveSettings.parse(asked.settings, "settings")
                if asked.revision < self._revision or (asked.revision == self._revision and wanted != self.settings):
                    return self._ack(
                        f"settings revision {asked.revision} is not newer than revision {self._revision}, in force",
                        "stale",
                    )
                if wanted != self.settings:
                    setup = replace(self._setup, targets=wanted.targets)
                    self.active.configure(configured_thresholds(wanted, self._limits, self._estimated), setup)
            except ValueError as error:  # of the thresholds, the profile, or a combination that is not supported
                return self._ack(str(error), "invalid")
            self.settings, self._revision = wanted, asked.revision
            return self._ack()

    def _ack(self, reason: str = "", code: str = "") -> Ack:
        version = self.active.current().thresholds.version
        return Ack(accepted=not code, active_version=version, reason=reason, code=code)


def configured_thresholds(
    settings: LiveSettings, limits: EngineLimits, estimated: IterationTimeModel | None = None
) -> Thresholds:
    """The thresholds that the settings give an engine by themselves.

    Without a profile they follow from the estimate, unless by that no request could meet the targets: a guess may not
    close the gate.

    Raises:
        ValueError: an unknown profile.
    """
    if settings.profile is None:
        if estimated is None or not is_reachable(settings.targets, estimated):
            return settings.thresholds
        return cold_thresholds(
            settings.thresholds, estimated, limits, targets=settings.targets,
            overflow_probability=settings.overflow_probability, source="an estimate",
        )
    return cold_thresholds(
        settings.thresholds, load_profile(settings.profile).time_model, limits, targets=settings.targets,
        overflow_probability=settings.overflow_probability,
    )
