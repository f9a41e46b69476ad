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
from simulator.engine.routing import Routing
from simulator.output.metrics import window_of
from simulator.output.rows import UNFINISHED, RequestRow
from simulator.output.run_files import RunWriter
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
    requests that no rule may reject.
    """

    def __init__(
        self, config: SimulationConfig, thresholds: Thresholds | None, writer: RunWriter,
        never_rejected: Collection[int] = (),
    ) -> None:
        baseline, profile = BASELINES[config.policy], load_profile(config.profile)
        self._config, self._declares, self._arrived, self._writer = config, config.declares, 0, writer
        self.stranded, self.unfinished = 0, 0
        self.returns = Returns(config.retries, config.workload.seed) if config.retries else None
        slowdown = parse_slowdown(config.slowdown) if config.slowdown else None
        speeds = parse_speeds(config.speeds, config.replicas)
        self.replicas = [
            VirtualReplica(
                index, _scheduler(config, thresholds), profile.time_model, writer, speed=speeds[index],
                give_up_s=config.give_up_s, rule=baseline.rule, ttft_s=config.slo.ttft_s,
                slowdown=None if index else slowdown,
                noise=_noise(config, index) if config.iteration_noise else None, returns=self.returns,
                never_rejected=never_rejected, speculation=config.speculation,
            )
            for index in range(config.replicas)
        ]
        self._routing = Routing(config, self.replicas, lambda: self._now_s) if config.replicas > 1 else None
        self._stats_due_s = config.stats_age_s
        self._control_due_s = self._latest_s = self._now_s = 0.0
        self._siblings = Siblings(config.max_model_len)
        self._controllers = [
            VirtualController(replica, config, profile.time_model, thresholds, writer)
            for replica in self.replicas if thresholds and config.controlled
        ]

    def arrive(self, number: int, request: SimRequest) -> None:
        """Advance to this arrival, then submit the request to a replica."""
        self._advance(request.arrival_s)
        self._arrived, self._latest_s = number + 1, request.arrival_s
        self._submit(number, request)

    def finish(self) -> None:
        """Run to the end, or with `until_decided` until every measured request has met or missed its targets."""
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
        """Advance to `until_s`, with reports and control cycles on the way."""
        if self._routing:
            while self._stats_due_s <= until_s:
                self._run_to(self._stats_due_s)
                self._routing.report()
                self._stats_due_s += self._config.stats_age_s
        while self._controllers and self._control_due_s <= until_s:
            self._run_to(self._control_due_s)
            one_cycle(self._controllers, self._siblings, self._control_due_s)
            self._control_due_s += self._config.period_s
        self._run_to(until_s)

    def _run_to(self, until_s: float) -> None:
        if self.returns is None:
            self._now_s = max(self._now_s, until_s)
            for replica in self.replicas:
                replica.advance(until_s)
            return
        while self._now_s < until_s:
            # The shortest retry pause is a whole step, so no retry falls into the step of its rejection.
            self._now_s = min(until_s, self._now_s + SHORTEST_PAUSE_S, self.returns.next_s)
            for replica in self.replicas:
                replica.advance(self._now_s)
            for attempt in self.returns.due(self._now_s):
                self._submit(attempt.request_number, attempt.request, attempt)

    def _submit(self, number: int, request: SimRequest, attempt: Attempt | None = None) -> None:
        declared = {EXPECTED_OUTPUT_TOKENS: request.output_tokens} if self._declares else None
        to = self._routing.choose(number, request, self._declares) if self._routing else self.replicas[0]
        to.submit(number, request, declared=declared, attempt=attempt)

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
