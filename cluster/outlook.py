"""What the controller can say of the replicas beyond their state: their history, and what the fluid model expects.

Asked for by the dashboard and `headrace status --watch`; nothing here tunes anything.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from cluster.history import History
from cluster.prospects import NothingKnown, Prospects, Values
from cluster.tuned import TunedReplica

RECENT_S = 120.0


class Outlook:
    """Of all replicas of an application. The estimates are read under one lock, since other threads refine them."""

    def __init__(self) -> None:
        self.history = History()
        self.modelling = threading.Lock()
        """Held by who reads or refines estimates."""
        self._prospects: tuple[int, dict[str, Any]] = (-1, {})

    def added(self, replicas: Mapping[str, TunedReplica], passes: int) -> dict[str, Any]:
        """`replicas`: by engine its `recent` counts, over `RECENT_S`, and seconds `still_s` without an iteration;
        `prospects`: by model what `Prospects.shown` says, or in words why nothing. Solved once after each cycle, of
        which there have been `passes`, and only when asked for."""
        if self._prospects[0] != passes:
            models = sorted({one.engine.model_id for one in replicas.values()})
            self._prospects = passes, {model_id: self._shown(replicas, model_id) for model_id in models}
        return {
            "replicas": {
                name: {"recent": self.history.recent(name, RECENT_S), "still_s": self.history.still_s(name)}
                for name in replicas
            },
            "prospects": self._prospects[1],
        }

    def predict(self, replicas: Mapping[str, TunedReplica], model_id: str, values: Values) -> dict[str, Any]:
        """The fluid model's plan for a model's replicas: `now`, and `then`, with other values.

        Raises:
            NothingKnown: no replica of the model has reported, or its policy has no such plan.
        """
        with self.modelling:
            prospects = _of_model(replicas, model_id)
            return {"now": prospects.planned(Values()), "then": prospects.planned(values)}

    def _shown(self, replicas: Mapping[str, TunedReplica], model_id: str) -> dict[str, Any] | str:
        try:
            with self.modelling:
                return _of_model(replicas, model_id).shown()
        except NothingKnown as error:
            return str(error)


def _of_model(replicas: Mapping[str, TunedReplica], model_id: str) -> Prospects:
    of_it = [one for one in replicas.values() if one.engine.model_id == model_id]
    others = {one.tuned.settings.thresholds.policy for one in of_it} - {"fluid"}
    if others:
        raise NothingKnown(f"the policy {others.pop()} plans no goodput; fluid does")
    return Prospects([one.tuner.model for one in of_it if one.tuner.model is not None])
