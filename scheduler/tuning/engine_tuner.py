"""One engine under a controller, the cluster's or its own: what is known of it, and what it is sent next.

No clock and no channel: a control loop asks for telemetry, calls `learn` and `next_push`, sends what comes out, and
tells `answered` how it went.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from scheduler.estimation.first_time_model import first_time_model
from scheduler.estimation.iteration_time_fit import FitRejected
from scheduler.messages import Ack, Telemetry
from scheduler.model.fluid import finite_or_none
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.thresholds import Thresholds
from scheduler.tuning.next_push import NextPush, next_push
from scheduler.tuning.replica_model import Proposal, ReplicaModel
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.slo import Slo


@dataclass(frozen=True, slots=True)
class Change:
    """Thresholds offered to an engine in place of others, whether they were accepted, and the reason in words."""

    old: Thresholds
    new: Thresholds
    accepted: bool
    reason: str


class EngineTuner:
    """The model of one engine between two reports.

    time_model: its profile's; None: that of its fluid parameters, which it estimates where it knows its device; else
    its first iterations are measured before anything is proposed.
    profiled: the same, for a model made anew; it may be replaced. cursor: the records read so far. note: the latest
    decision in words.
    """

    def __init__(
        self, settings: TuningSettings, time_model: IterationTimeModel | None, configured: Thresholds
    ) -> None:
        self._settings, self.profiled, self._configured = settings, time_model, configured
        self._model = self._fresh()
        self._pushed_at_s = float("-inf")
        self.cursor = 0
        self.note = ""
        self.measuring = ""
        """Why there is no iteration-time model yet."""
        self._proposal: Proposal | None = None

    @property
    def is_measuring(self) -> bool:
        """Whether too few iterations have been seen for a first iteration-time model."""
        return self._model is None

    @property
    def targets(self) -> Slo:
        """The latency targets that it is tuned for."""
        return self._settings.targets

    @property
    def time_model(self) -> IterationTimeModel | None:
        """The present iteration-time model; None while it is measured."""
        return None if self._model is None else self._model.time_model.time_model

    @property
    def model(self) -> ReplicaModel | None:
        """The estimates, for questions that change nothing; None while the first iterations are measured."""
        return self._model

    def follow(self, settings: TuningSettings, configured: Thresholds) -> None:
        """Other settings and configured thresholds from the next report on; the estimates stay."""
        self._settings, self._configured = settings, configured
        if self._model is not None:
            self._model.follow(settings, configured)

    @property
    def shown(self) -> dict[str, Any]:
        """The targets, the estimates and the plan, JSON-ready."""
        return _shown(self._settings.targets, self._model, self._proposal)

    @property
    def planned(self) -> dict[str, Any]:
        """Of `shown`, the two figures of the plan that a history keeps."""
        equilibrium, forecast = (None, None) if (one := self._proposal) is None else (one.equilibrium, one.forecast)
        return {
            "fluid": None if equilibrium is None else {"memory_tokens": finite_or_none(equilibrium.memory_tokens)},
            "forecast": None if forecast is None else {"capacity_rps": finite_or_none(forecast.plan.capacity_rps)},
        }

    def learn(self, telemetry: Telemetry) -> Proposal:
        """Update the model from a report and solve; tens of milliseconds."""
        return self.take(telemetry) or self.propose()

    def propose(self, plan: Callable[[ReplicaModel], Proposal] | None = None) -> Proposal:
        """Solve for the model that `take` has updated; plan: in place of the model's own `propose`."""
        assert self._model is not None
        self._proposal = self._model.propose() if plan is None else plan(self._model)
        return self._proposal

    def take(self, telemetry: Telemetry) -> Proposal | None:
        """Update the model from a report; without a model yet, the proposal that says so. A model that raises on a
        report is replaced by a new one, which continues after that report, so bad records are not read twice."""
        if telemetry.digest is not None and telemetry.digest.measuring:
            return self._without_model(telemetry.digest.measuring)
        if self._model is None and telemetry.digest is not None and telemetry.digest.time_model is not None:
            self._model = self._model_from(telemetry.digest.time_model)
        if self._model is None and telemetry.thresholds.fluid is not None:
            # The engine's own estimate, or what an earlier controller knew.
            known = telemetry.thresholds.fluid.time_model
            self._model = self._model_from(known.faster(1 / telemetry.limits.pipeline_depth))
        if self._model is None:
            measured = first_time_model(telemetry.iterations)
            if isinstance(measured, FitRejected):  # the same records again, and those that follow
                return self._without_model(measured.reason)
            self._model = self._model_from(measured.faster(1 / telemetry.limits.pipeline_depth))
        try:
            self._model.observe(telemetry)
        except Exception:
            self._model = self._fresh()
            raise
        finally:
            self.cursor = telemetry.cursor
        return None

    def _without_model(self, reason: str) -> Proposal:
        self.measuring = reason
        return Proposal(self._configured, None, f"no profile: {reason}; the configured thresholds")

    def next_push(self, telemetry: Telemetry, proposal: Proposal, now_s: float) -> NextPush:
        """What to send at this second of the controller's clock; see `scheduler.tuning.next_push`."""
        push = next_push(
            telemetry, proposal, pushed_s_ago=now_s - self._pushed_at_s, validity_s=self._settings.validity_s
        )
        if push.thresholds is None:
            self.note = push.reason
        return push

    def answered(self, active: Thresholds, push: NextPush, ack: Ack, now_s: float) -> Change | None:
        """Note the engine's answer to a push that replaces `active`; None for a renewal, which is no change."""
        assert push.thresholds is not None
        self.note = push.thresholds.reason if ack.accepted else f"rejected: {ack.reason}"
        if ack.accepted:
            self._pushed_at_s = now_s
        if push.changed or not ack.accepted:
            return Change(active, push.thresholds, ack.accepted, self.note)
        return None

    def _fresh(self) -> ReplicaModel | None:
        return None if self.profiled is None else self._model_from(self.profiled)

    def _model_from(self, time_model: IterationTimeModel) -> ReplicaModel:
        return ReplicaModel(self._settings, time_model, self._configured)


def _shown(targets: Slo, model: ReplicaModel | None, proposal: Proposal | None) -> dict[str, Any]:
    told = {"targets": asdict(targets)}
    if model is None:
        return told | {"rate_rps": 0.0, "finished_seen": 0, "time_model": None, "fluid": None, "forecast": None}
    time_model = model.time_model
    equilibrium = proposal.equilibrium if proposal else None
    forecast = proposal.forecast if proposal else None
    fluid = None
    if equilibrium is not None:
        fluid = {
            "load": equilibrium.load,
            "iteration_time_s": finite_or_none(equilibrium.iteration_time_s),
            "memory_tokens": finite_or_none(equilibrium.memory_tokens),
            "kv_capacity_tokens": equilibrium.kv_capacity_tokens,
            "stable": equilibrium.stable,
            "fits_memory": equilibrium.fits_memory,
            "critical_rate_scale": finite_or_none(equilibrium.critical_rate_scale),
            "limit": equilibrium.limit,
        }
    return told | {
        "rate_rps": model.rate_rps,
        "finished_seen": model.finished_seen,
        "time_model": asdict(time_model.time_model)
        | {"r2": time_model.r2, "mape": time_model.mape, "records": time_model.records},
        "fluid": fluid,
        "forecast": forecast.as_dict() if forecast else None,
    }
