"""Simulated replicas learn together by the controller's own rule; a single one is tuned as if there were none."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.tuning.replica_model import Proposal, ReplicaModel
from scheduler.tuning.siblings import Siblings
from simulator.config import simulation_config
from simulator.engine import fleet as fleet_module
from simulator.run import simulate

RUN = {
    "policy": "fluid", "lengths": "p300~0.8d60~0.8", "rate_rps": 5.0, "requests": 150, "slo_ttft_s": 2.0,
    "slo_tpot_s": 0.06, "seed": 3, "iteration_noise": 0.03,
}


def summary(**changes: Any) -> dict[str, Any]:
    found = simulate(simulation_config(RUN | changes))
    del found["wall_s"]
    return found


@pytest.mark.parametrize("seed", [3, 4])
def test_a_run_of_a_single_replica_is_the_same_without_siblings(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = summary(seed=seed)

    def alone(siblings: Siblings, name: str, model: ReplicaModel) -> Proposal:
        return model.propose()

    monkeypatch.setattr(Siblings, "propose", alone)
    assert summary(seed=seed) == shipped


def test_a_slow_replica_of_a_run_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Siblings] = []

    class Kept(Siblings):
        def __init__(self, longest: int) -> None:
            super().__init__(longest)
            made.append(self)

    monkeypatch.setattr(fleet_module, "Siblings", Kept)
    summary(replicas=3, speeds="1,1,0.5", rate_rps=12.0, requests=300)
    (found,) = [one.deviations for one in made if one.deviations]
    assert set(found) == {"2"}
    assert found["2"].low < 2.0 < found["2"].high or found["2"].factor == pytest.approx(2.0, rel=0.03)
