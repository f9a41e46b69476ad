"""One replica's entry in the controller's state."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from scheduler.model.fluid import finite_or_none
from scheduler.tuning.replica_model import Proposal, ReplicaModel
from scheduler.tuning.slo import Slo


def shown_of(targets: Slo, model: ReplicaModel, proposal: Proposal | None) -> dict[str, Any]:
    """JSON-ready: the targets, and what is estimated and solved; `proposal` is None before the first report."""
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
    return {
        "targets": asdict(targets),
        "rate_rps": model.rate_rps,
        "finished_seen": model.finished_seen,
        "time_model": asdict(time_model.time_model)
        | {"r2": time_model.r2, "mape": time_model.mape, "records": time_model.records},
        "fluid": fluid,
        "forecast": forecast.as_dict() if forecast else None,
    }
