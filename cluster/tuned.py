"""A model as the controller tunes it, and one engine of it."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.settings import ModelSettings
from replicas.ranks import EngineAddress, ServedModel
from scheduler.messages import Telemetry
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.profiles import load_profile
from scheduler.settings import LiveSettings
from scheduler.tuning.engine_tuner import EngineTuner
from scheduler.tuning.replica_model import Proposal


@dataclass(frozen=True, slots=True)
class TunedModel:
    """A model of the application, and the settings with which its replicas are tuned."""

    served: ServedModel
    settings: ModelSettings

    @property
    def time_model(self) -> IterationTimeModel | None:
        """The profile's; None: none is named, and engines say what they estimate."""
        profile = self.settings.controller.profile
        return load_profile(profile).time_model if profile else None

    def new_tuner(self) -> EngineTuner:
        """What is known of a replica before it has reported anything."""
        return EngineTuner(self.settings.tuning(), self.time_model, self.settings.thresholds)


@dataclass(slots=True)
class TunedReplica:
    """One engine: its address, what it serves, its tuner, and when it is due (monotonic seconds)."""

    engine: EngineAddress
    tuned: TunedModel
    tuner: EngineTuner
    due_s: float = float("-inf")

    def follow(self, tuned: TunedModel) -> None:
        """Tune by these settings from the next report on."""
        self.tuned, self.tuner.profiled = tuned, tuned.time_model

    def take(self, telemetry: Telemetry) -> Proposal | None:
        """Update the model from a report, by the settings that the engine says are in force there; see
        `EngineTuner.take`. Blocking, so not on an event loop."""
        tuning, configured = self.tuned.settings.tuning(), self.tuned.settings.thresholds
        if telemetry.settings is not None:
            engine = LiveSettings.reported(telemetry.settings)
            tuning, configured = engine.tuning(tuning), engine.thresholds
        self.tuner.follow(tuning, configured)
        return self.tuner.take(telemetry)
