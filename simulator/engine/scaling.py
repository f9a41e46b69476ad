"""The life of the replicas of a simulation whose number changes: started, serving, leaving, gone."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from scheduler.messages import Counters
from scheduler.tuning.kept_replicas import kept_replicas
from scheduler.tuning.replica_model import ReplicaModel
from scheduler.tuning.scaler import Scaler, capacity_of
from scheduler.tuning.wanted_replicas import ScalingTerms
from simulator.config import SimulationConfig
from simulator.engine.controller import VirtualController
from simulator.engine.replica import VirtualReplica
from simulator.engine.replica_state import Sink
from simulator.output.metrics import delays_of
from simulator.output.rows import COMPLETED, IterationRow, RequestRow
from simulator.scenario.autoscalers import FLUID, RIVALS, Autoscaler, FleetView, parse_autoscaler

Member = tuple[VirtualReplica, VirtualController | None]


class OurScaler(Autoscaler):
    """The shipped decision, fed by the simulated controllers."""

    def __init__(self, scaling: Scaling, terms: ScalingTerms) -> None:
        self._scaling, self._scaler = scaling, Scaler(terms)

    def wanted(self, view: FleetView) -> int:
        """See `scheduler.tuning.scaler`."""
        engines: dict[str, tuple[str, Counters]] = {}
        models: list[ReplicaModel] = []
        for replica, controller in self._scaling.serving:
            if controller is not None and (telemetry := controller.model.telemetry) is not None:
                engines[str(replica.index)] = telemetry.engine_id, telemetry.counters
                models.append(controller.model)
        names = [str(replica.index) for replica, _ in self._scaling.serving] + self._scaling.names_coming
        wanted = self._scaler.look(view.now_s, {name: (name,) for name in names}, engines, lambda: capacity_of(models))
        return wanted.replicas


class Answered:
    """Passes a run's rows on, and keeps the TTFT and TPOT of completed requests until they are taken."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self.wants_iterations = sink, sink.wants_iterations
        self._times: list[tuple[float, float]] = []

    def request(self, row: RequestRow) -> None:
        """A request is over."""
        if row.outcome == COMPLETED:
            since_s = row.arrival_s if row.returned_s is None else row.returned_s
            delays = delays_of(since_s, row.first_token_s, row.finished_s, row.output_tokens)
            self._times.append((float(delays.ttft_s), float(delays.tpot_s)))
        self._sink.request(row)

    def iteration(self, row: IterationRow) -> None:
        """An iteration."""
        self._sink.iteration(row)

    def take(self) -> tuple[tuple[float, float], ...]:
        """Seconds to the first token and per further token, of what completed since the last call."""
        times, self._times = tuple(self._times), []
        return times


class Scaling:
    """Starts and ends replicas as a rule says.

    make: a new replica of a number, with its controller. serving: those that take requests; leaving: those that finish
    what they have. replica_s: seconds of all replicas while `counting`, from when one is started until it has finished
    its last request.
    """

    def __init__(
        self, config: SimulationConfig, make: Callable[[int], Member], answered: Answered, oracle: Autoscaler | None
    ) -> None:
        assert config.autoscale is not None
        name, numbers = parse_autoscaler(config.autoscale)
        self._fewest, self._most, self._start_up_s = config.min_replicas, config.max_replicas, config.start_up_s
        self._make, self._made, self._slots = make, 0, config.max_num_seqs
        self.serving: list[Member] = []
        self.leaving: list[Member] = []
        self._coming: deque[tuple[float, int]] = deque()
        self.replica_s = self._counted_s = 0.0
        self.counting, self._answered = True, answered
        if name == FLUID:
            terms = ScalingTerms(start_up_s=config.start_up_s, **_costs(numbers))
            self._rule: Autoscaler = OurScaler(self, terms)
            self._every_s = config.period_s
        else:
            self._rule = oracle or RIVALS[name](config.slo, **numbers)
            self._every_s = self._rule.every_s
        self._look_s = self._every_s
        for _ in range(min(max(config.replicas, self._fewest), self._most)):
            self.serving.append(self._make(self._next()))

    @property
    def next_s(self) -> float:
        """When `step` is due next."""
        return min(self._look_s, self._coming[0][0] if self._coming else math.inf)

    @property
    def names_coming(self) -> list[str]:
        """Numbers of the replicas that do not serve yet."""
        return [str(number) for _, number in self._coming]

    @property
    def all(self) -> list[Member]:
        """The replicas that have anything to do."""
        return [*self.serving, *self.leaving]

    def step(self, now_s: float, waiting: int) -> None:
        """Replicas that have come up serve; then the rule is asked if it is its turn. waiting: requests that wait for a
        first replica."""
        self.count(now_s)
        while self._coming and self._coming[0][0] <= now_s:
            self.serving.append(self._make(self._coming.popleft()[1]))
        self.leaving = [one for one in self.leaving if one[0].ongoing]
        if self._look_s > now_s:
            return
        self._look_s += self._every_s
        ongoing = waiting + sum(replica.ongoing for replica, _ in self.all)
        view = FleetView(now_s, len(self.serving), len(self._coming), ongoing, self._answered.take())
        present = len(self.serving) + len(self._coming)
        wanted = max(self._rule.wanted(view), kept_replicas(ongoing, self._slots, present))
        self._become(min(max(wanted, self._fewest), self._most), now_s)

    def count(self, now_s: float) -> None:
        """Add up `replica_s` until now."""
        if self.counting:
            self.replica_s += (now_s - self._counted_s) * (len(self.all) + len(self._coming))
            self._counted_s = now_s

    def _become(self, number: int, now_s: float) -> None:
        while len(self.serving) + len(self._coming) < number:
            self._coming.append((now_s + self._start_up_s, self._next()))
        while len(self.serving) + len(self._coming) > number:
            if self._coming:
                self._coming.pop()
            else:
                idlest = min(self.serving, key=lambda one: (one[0].ongoing, -one[0].index))
                self.serving.remove(idlest)
                self.leaving.append(idlest)

    def _next(self) -> int:
        self._made += 1
        return self._made - 1


def _costs(numbers: dict[str, float]) -> dict[str, float]:
    return {"late_costs_requests": numbers["late_costs"]} if "late_costs" in numbers else {}

