"""How many replicas each model should have: decided in each control cycle, and left where Ray Serve's policy reads it.

What a start takes is kept in the cluster's store too, so that a new controller knows it.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from cluster.tuned import TunedModel, TunedReplica
from replicas.ranks import replica_of
from replicas.store import Store, wanted_key
from scheduler.messages import Counters
from scheduler.tuning.replica_model import ReplicaModel
from scheduler.tuning.scaler import Scaler, capacity_of
from scheduler.tuning.wanted_replicas import Wanted

_LEAST_VALID_S, _VALID_PERIODS = 30.0, 6.0
logger = logging.getLogger(__name__)


def start_ups_key(deployment: str) -> str:
    """Where the store has the seconds that the latest replicas took to come up."""
    return f"start_ups/{deployment}"


class Scaling:
    """Of all models of an application whose policy is `fluid`; other policies plan no such number.

    wanted: the latest decisions, by model.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._scalers: dict[str, Scaler] = {}
        self.wanted: dict[str, Wanted] = {}

    def look(
        self, now_s: float, number: Any, models: Mapping[str, TunedModel], replicas: Mapping[str, TunedReplica],
        answered: Collection[str],
    ) -> None:
        """Decide for every model, and leave it in the store; blocking.

        number: of this look, another for each. models: by deployment. replicas: the engines by name. answered: those
        whose latest report is new.
        """
        for deployment, model in models.items():
            of_it = {name: one for name, one in replicas.items() if one.engine.deployment == deployment}
            model_id = model.served.model_id
            if model.settings.thresholds.policy != "fluid":
                self.wanted.pop(model_id, None)
                continue
            try:
                wanted = self._decide(now_s, deployment, model, of_it, answered)
                period_s = model.settings.controller.period_s
                self._store.put(wanted_key(deployment), wanted.as_dict() | {
                    "look": number, "valid_for_s": max(_LEAST_VALID_S, _VALID_PERIODS * period_s),
                })
                self.wanted[model_id] = wanted
            except Exception:
                logger.exception("how many replicas of %s there should be is not decided", model_id)

    def shown(self) -> dict[str, Any]:
        """The decisions by model, JSON-ready."""
        return {model_id: wanted.as_dict() for model_id, wanted in self.wanted.items()}

    def _decide(
        self, now_s: float, deployment: str, model: TunedModel, of_it: Mapping[str, TunedReplica],
        answered: Collection[str],
    ) -> Wanted:
        terms = model.settings.autoscaling.terms()
        scaler = self._scalers.get(deployment)
        if scaler is None:
            known = self._store.get(start_ups_key(deployment))
            scaler = self._scalers[deployment] = Scaler(terms, known if isinstance(known, list) else ())
        scaler.follow(terms)
        before = scaler.start_ups_s
        engines: dict[str, tuple[str, Counters]] = {}
        groups: dict[str, list[str]] = defaultdict(list)
        known_models: list[ReplicaModel] = []
        for name, one in of_it.items():
            estimates = one.tuner.model
            telemetry = estimates.telemetry if estimates else None
            if telemetry is not None and telemetry.draining:
                continue
            groups[replica_of(name)].append(name)
            if estimates is not None and telemetry is not None:
                known_models.append(estimates)
                if name in answered:
                    engines[name] = telemetry.engine_id, telemetry.counters
        wanted = scaler.look(now_s, groups, engines, lambda: capacity_of(known_models, model.served.ranks))
        if scaler.start_ups_s != before:
            self._store.put(start_ups_key(deployment), list(scaler.start_ups_s))
        return wanted
