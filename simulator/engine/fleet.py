"""The replicas of one simulation, with their controllers, the router and retrying clients."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection
from typing import Any

from pydantic import ValidationError

from scheduler.model.profiles import load_profile
from scheduler.settings import EXPECTED_OUTPUT_TOKENS
from scheduler.thresholds import EngineLimits, Thresholds, thresholds_as_dict
from scheduler.tuning.siblings import Siblings
from simulator.config import SimulationConfig, SimulationError
from simulator.engine.controller import VirtualController, one_cycle
from simulator.engine.replica import VirtualReplica
from simulator.engine.replica_state import Sink
from simulator.engine.routing import Routing
from simulator.engine.scaling import Answered, Member, Scaling
from simulator.output.metrics import window_of
from simulator.output.rows import UNFINISHED, RequestRow
from simulator.output.run_files import RunWriter
from simulator.scenario.autoscalers import Autoscaler
from simulator.scenario.baselines import BASELINES
from simulator.scenario.routers import parse_speeds
from simulator.scenario.slowdown import parse_slowdown
from simulator.scenario.speculation import speculative_args
from simulator.workload.clients import SHORTEST_PAUSE_S, Attempt, Returns
from simulator.workload.requests import SimRequest

_LOOK_EVERY_S = 1.0


class Fleet:
    """Takes requests by arrival time and advances all replicas in the order of virtual time.

    thresholds: the replicas start with these; a controller keeps their fixed fields. never_rejected: numbers of
    requests that no rule may reject. oracle: the rule for the number of replicas that knows the future, where the
    configuration names it.
    """

    def __init__(
        self, config: SimulationConfig, thresholds: Thresholds | None, writer: RunWriter,
        never_rejected: Collection[int] = (), oracle: Autoscaler | None = None,
    ) -> None:
        self._config, self._declares, self._arrived, self._writer = config, config.declares, 0, writer
        self._thresholds, self._never_rejected = thresholds, never_rejected
        self.stranded, self.unfinished = 0, 0
        self.returns = Returns(config.retries, config.workload.seed) if config.retries else None
        self._stats_due_s, self._control_due_s = config.stats_age_s, 0.0
        self._latest_s = self._now_s = 0.0
        self._waiting: list[tuple[int, SimRequest, Attempt | None]] = []
        self.replicas: list[VirtualReplica] = []
        self._siblings = Siblings(config.max_model_len)
        self._scaling: Scaling | None = None
        self._sink: Sink = writer
        if config.autoscale:
            self._sink = answered = Answered(writer)
            self._scaling = Scaling(config, self._make, answered, oracle)
            self._members = self._scaling.all
        else:
            self._members = [self._make(index) for index in range(config.replicas)]
        several = config.replicas > 1 or self._scaling is not None
        self._routing = Routing(config, self._taking(), lambda: self._now_s) if several else None

    @property
    def replica_s(self) -> float:
        """Seconds of all replicas together until the last arrival."""
        return self._scaling.replica_s if self._scaling else len(self.replicas) * self._latest_s

    def _make(self, index: int) -> Member:
        """A new replica with its controller."""
        config, profile = self._config, load_profile(self._config.profile)
        speeds = parse_speeds(config.speeds, config.replicas)
        slowdown = parse_slowdown(config.slowdown) if config.slowdown and not index else None
        replica = VirtualReplica(
            index, _scheduler(config, self._thresholds), profile.time_model, self._sink,
            speed=speeds[index % len(speeds)], give_up_s=config.give_up_s, rule=BASELINES[config.policy].rule,
            ttft_s=config.slo.ttft_s, slowdown=slowdown,
            noise=_noise(config, index) if config.iteration_noise else None, returns=self.returns,
            never_rejected=self._never_rejected, speculation=config.speculation,
        )
        replica.now_s = self._now_s
        self.replicas.append(replica)
        if not (self._thresholds and config.controlled):
            return replica, None
        return replica, VirtualController(replica, config, profile.time_model, self._thresholds, self._writer)

    def _taking(self) -> list[VirtualReplica]:
        """The replicas that take requests."""
        return [replica for replica, _ in (self._scaling.serving if self._scaling else self._members)]

    def arrive(self, number: int, request: SimRequest) -> None:
        """Advance to this arrival, then submit the request to a replica."""
        self._advance(request.arrival_s)
        self._arrived, self._latest_s = number + 1, request.arrival_s
        self._submit(number, request)

    def finish(self) -> None:
        """Run to the end, or with `until_decided` until every measured request has met or missed its targets."""
        if self._scaling:
            self._scaling.count(self._latest_s)
            self._scaling.counting = False
        while self._waiting:  # for a first replica
            self._advance(self._now_s + _LOOK_EVERY_S)
        if self._config.until_decided:
            self._decide()
            self.unfinished = sum(replica.leave_unfinished() for replica in self.replicas) + self._leave_returns()
            return
        while True:
            while self.returns and (self.returns.next_s < math.inf or any(one.moves for one in self.replicas)):
                self._run_to(self._now_s + _LOOK_EVERY_S)
            self.stranded = sum(len(replica.finish()) for replica in self.replicas)
            if not self.returns or self.returns.next_s == math.inf:
                return

    def _decide(self) -> None:
        measured, targets = window_of(self._arrived, self._config.window), self._config.slo
        now_s = self._latest_s
        while any(replica.undecided(measured, now_s, targets) for replica in self.replicas) or (
            self.returns and any(attempt.request_number in measured for attempt in self.returns.waiting())
        ):
            now_s += _LOOK_EVERY_S
            self._run_to(now_s)

    def _advance(self, until_s: float) -> None:
        """Advance to `until_s`, with reports, control cycles and changes of the number of replicas on the way."""
        while (due_s := self._next_due_s()) <= until_s:
            self._run_to(due_s)
            if self._routing and self._stats_due_s <= due_s:
                self._routing.report()
                self._stats_due_s += self._config.stats_age_s
            if self._control_due_s <= due_s:
                one_cycle([one for _, one in self._members if one is not None], self._siblings, due_s)
                self._control_due_s += self._config.period_s
            if self._scaling and self._scaling.next_s <= due_s:
                self._scale(self._scaling, due_s)
        self._run_to(until_s)

    def _next_due_s(self) -> float:
        return min(
            self._stats_due_s if self._routing else math.inf, self._control_due_s,
            self._scaling.next_s if self._scaling else math.inf,
        )

    def _scale(self, scaling: Scaling, now_s: float) -> None:
        scaling.step(now_s, len(self._waiting))
        self._members = scaling.all
        if self._routing:
            self._routing.follow(self._taking())
        if scaling.serving:
            waiting, self._waiting = self._waiting, []
            for number, request, attempt in waiting:
                self._submit(number, request, attempt)

    def _run_to(self, until_s: float) -> None:
        if self.returns is None:
            self._now_s = max(self._now_s, until_s)
            for replica, _ in self._members:
                replica.advance(until_s)
            return
        while self._now_s < until_s:
            # The shortest retry pause is a whole step, so no retry falls into the step of its rejection.
            self._now_s = min(until_s, self._now_s + SHORTEST_PAUSE_S, self.returns.next_s)
            for replica, _ in self._members:
                replica.advance(self._now_s)
            for attempt in self.returns.due(self._now_s):
                self._submit(attempt.request_number, attempt.request, attempt)

    def _submit(self, number: int, request: SimRequest, attempt: Attempt | None = None) -> None:
        if self._scaling and not self._scaling.serving:
            self._waiting.append((number, request, attempt))
            return
        declared = {EXPECTED_OUTPUT_TOKENS: request.output_tokens} if self._declares else None
        to = self._routing.choose(number, request, self._declares) if self._routing else self.replicas[0]
        to.submit(number, request, declared=declared, attempt=attempt, reached_s=self._now_s)

    def _leave_returns(self) -> int:
        """Record as unfinished the requests with a retry still to come; returns their number."""
        attempts = list(self.returns.waiting()) if self.returns else []
        for attempt in attempts:
            sent = attempt.request
            self._writer.request(
                RequestRow(
                    index=attempt.request_number, replica=0, type=sent.type_name, arrival_s=sent.arrival_s,
                    first_token_s=None, finished_s=None, prompt_tokens=sent.prompt_tokens, output_tokens=0,
                    preemptions=0, outcome=UNFINISHED, attempts=attempt.number,
                )
            )
        return len(attempts)


def limits_of(config: SimulationConfig) -> EngineLimits:
    """The engine's own limits, the same for every replica."""
    baseline, profile = BASELINES[config.policy], load_profile(config.profile)
    blocks = (config.kv_tokens or profile.kv_capacity_tokens) // config.block_tokens
    plain_cap = config.cap if config.cap and not baseline.policy else config.max_num_seqs
    return EngineLimits(
        kv_capacity_tokens=blocks * config.block_tokens, block_tokens=config.block_tokens, max_num_seqs=plain_cap,
        max_num_batched_tokens=config.token_budget or baseline.token_budget, max_model_len=config.max_model_len,
        speculative_tokens=config.speculative_tokens or 0, pipeline_depth=config.pipeline_parallel,
    )


def _noise(config: SimulationConfig, index: int) -> Callable[[], float]:
    """Lognormal factors of mean 1 with the configured relative standard deviation, the same for the same seed."""
    rng, sigma = random.Random(f"{config.workload.seed}:{index}"), math.sqrt(math.log1p(config.iteration_noise**2))
    return lambda: math.exp(rng.gauss(-sigma * sigma / 2, sigma))


def _scheduler(config: SimulationConfig, thresholds: Thresholds | None) -> Any:
    from simulator.engine.vllm_harness import make_scheduler

    baseline, limits = BASELINES[config.policy], limits_of(config)
    if config.pipeline_parallel > 1 and not (config.async_scheduling or baseline.policy):
        raise SimulationError(
            f"async_scheduling = False: {config.policy} has no pipeline stages without it; allowed: True, or one of "
            f"{', '.join(name for name, other in BASELINES.items() if other.policy)}"
        )
    settings = {"thresholds": thresholds_as_dict(thresholds), "allow_strict": True} if thresholds else {}
    drafts = config.speculative_tokens
    drafting = speculative_args(drafts, async_scheduling=config.async_scheduling) if drafts else {}
    try:
        return make_scheduler(
            baseline.scheduler_class(), blocks=limits.kv_capacity_tokens // limits.block_tokens,
            block_tokens=limits.block_tokens, max_model_len=limits.max_model_len,
            additional_config={"headrace": settings}, max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens, async_scheduling=config.async_scheduling,
            enable_prefix_caching=config.prefix_caching, pipeline_parallel_size=config.pipeline_parallel,
            **drafting, **baseline.engine_args,
        )
    except ValueError as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise SimulationError(f"the engine rejects its settings: {said.removeprefix('Value error, ')}") from error
