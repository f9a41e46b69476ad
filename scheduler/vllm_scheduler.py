"""`HeadraceScheduler`: vLLM's V1 scheduler with an admission policy. Usable alone, without Ray.

    vllm serve MODEL --scheduler-cls headrace.HeadraceScheduler --middleware headrace.RejectionMiddleware \\
        --additional-config '{"headrace": {"targets": {"ttft_s": 3, "tpot_s": 0.08}}}'

Preemption, prefix cache, chunked prefill, LoRA, structured output, priorities and aborts stay vLLM's. This class only
decides which waiting requests vLLM sees, which running requests pause for an iteration (`sit_out`), and the iteration's
token budget.

This module is the fence around vLLM's non-public scheduler surface: `tests/scheduler/test_vllm_seam.py` fails when an
upgrade moves any of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Set
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from scheduler.alone.keeper import EngineControl
from scheduler.engine.active_thresholds import Active
from scheduler.engine.admission_queue import AdmissionQueue
from scheduler.engine.channel import ChannelServer, engine_id
from scheduler.engine.client_input import declared_lengths, tenant_of, turned_away
from scheduler.engine.drain import DrainRule
from scheduler.engine.fair_queue import DEFAULT_TENANT
from scheduler.engine.held import HeldRequests
from scheduler.engine.iteration_timer import IterationTimer
from scheduler.engine.kv_capacity import kv_capacity_tokens
from scheduler.engine.lives import Lives
from scheduler.engine.pipeline import coming, has_more_than_its_share, pipeline_depth
from scheduler.engine.prefix_hits import PrefixHits
from scheduler.engine.queue_room import QueueRoom
from scheduler.engine.recorder import Recorder
from scheduler.engine.rejector import Rejector
from scheduler.engine.running_requests import BatchWork, EngineBatch, batch_work, decode_steps, tokens_to_decode
from scheduler.engine.settings_in_force import SettingsInForce
from scheduler.engine.start_estimate import NO_ESTIMATE, start_estimate
from scheduler.messages import Gauges, Report, RunningLengths, Stats, Telemetry
from scheduler.policies import NO_REQUESTS, UNKNOWN_TYPE, Policy, RunningBatch, Snapshot, Waiting, make_policy
from scheduler.rejection import TOO_LATE, TOO_MANY, Rejection
from scheduler.settings import SchedulerSettings
from scheduler.support import EngineSetup, require_supported
from scheduler.thresholds import EngineLimits, Thresholds
from scheduler.tuning.slo import NO_SLO

logger = init_logger(f"vllm.headrace.{__name__}")  # below vLLM's logger, so that its handlers and level apply

_CUT_SHORT = (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR)


class HeadraceScheduler(AsyncScheduler):
    """vLLM's asynchronous scheduler with admission by Headrace's thresholds.

    Settings come from `additional_config["headrace"]`, see `SchedulerSettings`. Simulations may replace `clock` and
    `arrival_clock` before the first request, and fill `rejector.never`.

    Raises:
        ValueError: an unknown key or a value out of range in the settings; or a policy that does not support one of
            vLLM's settings (`scheduler.support`). The message names it.
    """

    running: list[Request]
    max_num_running_reqs: int
    max_num_scheduled_tokens: int
    num_spec_tokens: int

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        settings = SchedulerSettings.from_additional_config(vllm_config.additional_config)
        setup = EngineSetup.from_vllm_config(vllm_config, settings.targets, controller=settings.is_tuned_somewhere)
        require_supported(setup, settings.thresholds)  # before anything starts
        super().__init__(vllm_config, *args, **kwargs)
        self._depth = pipeline_depth(vllm_config)
        self._waits_for_tokens = self._depth > 1 and not self.scheduler_config.async_scheduling
        self.clock: Callable[[], float] = time.monotonic
        self.arrival_clock: Callable[[], float] = time.time  # the one that vLLM stamps `Request.arrival_time` with
        self.recorder = Recorder()
        limits = self._limits()
        estimated = start_estimate(vllm_config) if self._needs_estimate(settings) else NO_ESTIMATE
        if estimated.said:
            logger.info("Headrace: %s", estimated.said)
        self.in_force = SettingsInForce(
            settings, limits, lambda: self.clock(), setup, self.make_policy, estimated.time_model
        )
        self.active = self.in_force.active
        self._engine_id, self._trusts_ingress = engine_id(), settings.trust_tenants
        self._obeyed: Active = self.active.current()
        self._prefixes = PrefixHits(self.kv_cache_manager, self.block_size, self.cache_config.enable_prefix_caching)
        self._lives = Lives(lambda: self.clock(), lambda: self.arrival_clock(), self.max_model_len)
        self.admission_queue = AdmissionQueue(
            self.policy, self._classify, lambda: self.clock(), self.recorder.released,
            tenant_of if settings.trust_tenants else lambda request: DEFAULT_TENANT, self._describe,
            self._lives.arrived_s,
        )
        self.waiting = self.admission_queue
        self._held = HeldRequests(self)
        self._most_running, self._most_tokens = self.max_num_running_reqs, self.max_num_scheduled_tokens
        self._engines_chunk: int = self.scheduler_config.long_prefill_token_threshold  # 0: none
        # A prompt longer than the budget would never run where prompts are not computed in chunks.
        self._budget_can_split = self.scheduler_config.enable_chunked_prefill
        self.latest_work = BatchWork(0, 0, 0, 0)
        self._timer = IterationTimer(self._depth)
        self.rejector = Rejector(self.admission_queue, self._lives, settings.audit_share)
        self.drain = DrainRule(self.admission_queue)
        self._room = QueueRoom()
        self._pause_none = False
        self._channel: ChannelServer | None = None
        self._control = EngineControl(settings, vllm_config.parallel_config.data_parallel_index)
        if endpoint := self._control.endpoint:
            self._channel = ChannelServer(
                endpoint, self.active.offer, self.telemetry, self.stats, self.in_force.configure, self.drain.ask
            )
            logger.info("Headrace: control channel open, policy %s", settings.thresholds.policy)
            self._control.start()

    @staticmethod
    def _needs_estimate(settings: SchedulerSettings) -> bool:
        """Whether the engine, tuned by a controller, has no profile to start from."""
        return settings.first_profile is None and (settings.channel is not None or settings.has_own_controller)

    def make_policy(self, thresholds: Thresholds) -> Policy:
        """The policy that these thresholds name; override it to use your own (examples/own_policy.py).

        Called for the configured thresholds while the scheduler is built, and for each change of the rule.
        """
        return make_policy(thresholds)

    # One iteration.

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One iteration under the active thresholds: reject, admit, pause requests, let vLLM schedule the rest.

        An engine that drains follows no policy: it sends back what has not begun and runs the rest to the end.
        """
        obeyed = self.active.current()
        if obeyed is not self._obeyed:
            self._obey(obeyed)
        now_s = self.clock()
        if self.drain.asked:
            self._finish_rejected(self.drain.choose(self.requests))
            decision = self.drain.decision()
        else:
            decision = obeyed.policy.decide(self._snapshot(now_s))
        self._room.decided(decision, self.recorder.received)
        siblings = 0
        if decision.reject:
            rejected = self._reject([self.requests[name] for name in decision.reject], TOO_LATE, decision.drain_s)
            siblings = len(rejected - set(decision.reject))
        for type_name, count in decision.admit.items():
            # Rejected siblings may be among the admitted; a request that the policy has not looked at never enters.
            self.admission_queue.release(type_name, max(0, count - siblings))
        if decision.reject_last:
            self._reject(self.admission_queue.last(UNKNOWN_TYPE, decision.reject_last), TOO_MANY, decision.drain_s)

        self.admission_queue.seen()

        sit_out = () if self._pause_none else decision.sit_out
        held = self._held.take_out(sit_out, decision.evict_first, strict=obeyed.policy.strict)
        self.max_num_running_reqs = self._most_running - held
        asked = min(filter(None, (decision.token_budget, obeyed.thresholds.token_budget)), default=None)
        budget = (self._budget_can_split and asked) or self._most_tokens
        # Every running request gets its decode token and its drafts, however small the budget.
        self.max_num_scheduled_tokens = min(self._most_tokens, max(budget, self._decode_tokens(self._advancing())))
        chunk = obeyed.thresholds.prefill_chunk_tokens if self._budget_can_split else None
        self.scheduler_config.long_prefill_token_threshold = min(filter(None, (chunk, self._engines_chunk)), default=0)
        self._prefixes.step()
        try:
            output = super().schedule(throttle_prefills)
            self.latest_work = batch_work(output)
        finally:
            held = self._held.put_back()
            self.max_num_running_reqs = self._most_running
        self._lives.scheduled(output, self.requests, self._prefixes.shared_now, self.recorder.totals)
        self._after_schedule(output, held)
        return output

    def _reject(self, requests: list[Request], reason: str, drain_s: float) -> Set[str]:
        """End the requests that `Rejector.choose` selects; returns their ids."""
        return self._finish_rejected(self.rejector.choose(requests, reason, drain_s))

    def _finish_rejected(self, rejected: Mapping[str, Rejection]) -> Set[str]:
        self.rejector.begin(rejected, self.requests)
        self.finish_requests(list(rejected), RequestStatus.FINISHED_ABORTED)
        return rejected.keys()

    def _obey(self, active: Active) -> None:
        before, thresholds = self._obeyed.thresholds, active.thresholds
        self._obeyed = active
        if not thresholds.classifies_like(before):
            self.admission_queue.reclassify([*self.running, *self.skipped_waiting])
        logger.debug("Headrace: thresholds version %d active: %s", thresholds.version, thresholds.reason)

    def _snapshot(self, now_s: float) -> Snapshot:
        capacity, advancing = self.active.limits.kv_capacity_tokens, self._advancing()
        return Snapshot(
            now_s=now_s,
            waiting=self.admission_queue.views(),
            released=self.admission_queue.released + len(self._unable_to_run()),
            running=EngineBatch(self.running, self.admission_queue, self._lives, 1 + self.num_spec_tokens),
            kv_used_tokens=round(self.kv_cache_manager.usage * capacity),
            kv_capacity_tokens=capacity,
            prompt_backlog_tokens=self._prompt_backlog(),
            prompt_tokens_under_way=self._timer.prompt_tokens_under_way,
            released_requests=self._released_requests(),
            kv_read_tokens=sum([request.num_computed_tokens for request in advancing]) + len(advancing),
            slots=self.active.limits.slots - self.num_waiting_for_streaming_input,
            most_tokens=self._most_tokens,
            latest=self.recorder.latest_iteration,
            decode_tokens=self._decode_tokens(advancing),
            most_step_tokens=1 + self.num_spec_tokens,
            next_is_fuller=self._depth > 1 and has_more_than_its_share(advancing, self.running, self._depth),
        )

    def _advancing(self) -> list[Request]:
        """The running requests that the coming iteration can advance."""
        return self.running if self._depth == 1 else coming(self.running, self.current_step + 1)

    def _decode_tokens(self, advancing: list[Request]) -> int:
        return tokens_to_decode(advancing) if self.num_spec_tokens else len(advancing)

    def _released_requests(self) -> RunningBatch:
        """Admitted requests that do not run (yet)."""
        requests = [*self.admission_queue.released_requests(), *self._unable_to_run()]
        if not requests:
            return NO_REQUESTS
        return EngineBatch(requests, self.admission_queue, self._lives, 1 + self.num_spec_tokens)

    def _prompt_backlog(self) -> int:
        """Prompt tokens left to compute of running and admitted requests."""
        tokens: int = sum([request.num_tokens - request.num_computed_tokens for request in self._inflight_prefills])
        for request in (*self.admission_queue.released_requests(), *self._unable_to_run()):
            tokens += self._describe(request, 0.0).tokens_to_compute + request.num_output_tokens
        return tokens

    def _unable_to_run(self) -> list[Request]:
        """Admitted requests that vLLM passes over: a grammar compiles, adapters are full. Not the sessions that wait
        for their client's next input: these take a slot and memory, and no other time."""
        waits = RequestStatus.WAITING_FOR_STREAMING_REQ
        return [request for request in self.skipped_waiting if request.status != waits]

    def _describe(self, request: Request, since_s: float) -> Waiting:
        """A waiting request, as a policy sees it."""
        life = self._lives[request.request_id]
        cached, shared = self._prefixes.of(request)
        return Waiting(request.num_prompt_tokens, since_s, request.request_id, cached, shared, life.expected, life.most)

    def _after_schedule(self, output: SchedulerOutput, sitting_out: int) -> None:
        # If paused requests hold all the memory, no other can run: then none pauses in the next iteration.
        stuck = bool(sitting_out) and not output.total_num_scheduled_tokens
        stuck &= self._depth == 1 or not self._timer.busy  # a pipeline has empty batches while others are under way
        self._pause_none = stuck and not self._obeyed.policy.strict
        self._timer.composed(output, self.latest_work, self.clock())
        if output.preempted_req_ids:
            self.recorder.totals.preemptions += len(output.preempted_req_ids)
        self.recorder.gauges = Gauges(
            running=len(self.running),
            waiting=len(self.waiting) + len(self.skipped_waiting),
            held=self.admission_queue.held,
            sitting_out=sitting_out,
            kv_used_tokens=round(self.kv_cache_manager.usage * self.active.limits.kv_capacity_tokens),
        )

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """vLLM's own, with a record of the iteration and the outputs of rejected requests."""
        now_s = self.clock()
        executed = self._timer.finished(scheduler_output, now_s)
        if executed:
            self.recorder.iteration(now_s, executed.seconds, *executed.work)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self.num_spec_tokens:
            for computed, gained in decode_steps(scheduler_output, outputs):
                self.recorder.decoded(computed, gained)
        self._lives.note_first_tokens()
        self.admission_queue.settle()
        if executed:
            self._timer.more_to_run = bool(self.running)
        for client, answer in self.rejector.answers():
            outputs.setdefault(client, EngineCoreOutputs(outputs=[])).outputs.append(answer)
        return outputs

    # In a synchronous pipeline a request waits for its own token, as in vLLM's synchronous class.

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        if self._waits_for_tokens:
            Scheduler._update_after_schedule(self, scheduler_output)
        else:
            super()._update_after_schedule(scheduler_output)

    def _update_request_with_output(self, *args: Any, **kwargs: Any) -> Any:
        if self._waits_for_tokens:
            return Scheduler._update_request_with_output(self, *args, **kwargs)
        return super()._update_request_with_output(*args, **kwargs)

    # Arrival and end of requests.

    def add_request(self, request: Request) -> None:
        """Put a new request into the admission queue and record its arrival with its declared length."""
        if self.policy is not SchedulingPolicy.PRIORITY:
            request.priority = 0  # the client's; only vLLM's own policy "priority" lets it order requests
        if request.request_id not in self.requests:
            like_it = (request.num_prompt_tokens, self.known_output_tokens(request))
            if self._trusts_ingress and (count := turned_away(request)):
                self.recorder.turned_away(self.clock(), count, *like_it)
            self.recorder.arrival(self.clock(), *like_it)
            self._lives.begin(request)
        super().add_request(request)
        if request.pooling_params is not None:
            # An embedding has no output, so no target applies and it is never rejected.
            self.admission_queue.choices.commit(request.request_id)
        if rejection := self.admission_queue.choices.rejection_of(request.request_id):
            self._finish_rejected({request.request_id: rejection})

    def _enqueue_waiting_request(self, request: Request) -> None:
        # vLLM would put a request whose grammar compiles straight among the skipped, past the admission queue.
        if request.status == RequestStatus.WAITING_FOR_STREAMING_REQ:
            super()._enqueue_waiting_request(request)
        else:
            self.waiting.add_request(request)

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        now_s, outputs = self.clock(), request.num_output_tokens
        life = self._lives.end(request)
        first_s = now_s if math.isnan(life.first_token_s) else life.first_token_s
        self.recorder.finished(
            now_s, request.num_prompt_tokens, outputs, aborted=request.status in _CUT_SHORT,
            turned_away=self.rejector.kind_of(request.request_id), cached_tokens=life.cached_tokens,
            shared_tokens=life.shared_tokens, ttft_s=first_s - life.arrived_s if outputs else None,
            tpot_s=(now_s - first_s) / (outputs - 1) if outputs > 1 else None,
            too_late=self.rejector.reason_of(request.request_id) == TOO_LATE,
        )
        if request.status not in _CUT_SHORT:
            judged = outputs and self.in_force.targets != NO_SLO
            missed = life.missed(self.in_force.targets, first_s, now_s, outputs) if judged else {}
            self.recorder.judged(missed, audited=bool(judged) and life.audited)
        self.rejector.freed(request.request_id)
        self._prefixes.forget(request.request_id)
        self.admission_queue.forget(request)
        return super()._free_request(request, delay_free_blocks)

    def known_output_tokens(self, request: Request) -> int | None:
        """The declared output length: `expected_output_tokens`, at most `max_tokens`; else `max_tokens`; else None.

        A `max_tokens` that fills the model's context is vLLM's default and no declaration.
        """
        expected, most = declared_lengths(request, self.max_model_len)
        return most if expected is None else expected

    def _classify(self, request: Request) -> str:
        return self._obeyed.policy.classify(request.num_prompt_tokens, self.known_output_tokens(request))

    # Telemetry (called from the channel's thread) and the end.

    def telemetry(self, report: Report) -> Telemetry:
        """The engine's state and its records after `report.cursor`; safe from another thread.

        Without a cursor there are no records, and the requests are not walked.
        """
        current = self.active.current()
        cursor = self.recorder.cursor
        iterations, arrivals, finished, lost = self.recorder.since(report.cursor, cursor)
        requests = [] if report.cursor is None else list(self.requests.values())
        running = tuple(
            RunningLengths(request.num_prompt_tokens, request.num_output_tokens)
            for request in requests
            if request.status == RequestStatus.RUNNING
        )
        return Telemetry(
            engine_id=self._engine_id, clock_s=self.clock(), cursor=cursor, limits=self.active.limits,
            thresholds=current.thresholds, from_config=current.from_config, gauges=self.recorder.gauges,
            counters=self.recorder.counters(), iterations=iterations, arrivals=arrivals, finished=finished,
            running=running, records_lost=int(lost), draining=self.drain.asked,
            settings=self.in_force.settings.as_dict(),
        )

    def stats(self) -> Stats:
        """The figures for routing and readiness; safe from another thread; cost does not grow with the requests."""
        thresholds = self.active.current().thresholds
        arrivals, is_idle = self.recorder.received, not self.requests
        room = self._room.now(thresholds, self.active.limits, arrivals, is_idle=is_idle)
        outlook = self._room.outlook(arrivals, is_idle=is_idle)
        totals = self.recorder.totals
        return Stats.of_engine(
            self._engine_id, self.active.limits, thresholds, self.recorder.gauges, self.current_step, room,
            outlook, draining=self.drain.asked, prompt_tokens=totals.prompt_tokens, cached_tokens=totals.cached_tokens,
        )

    def shutdown(self) -> None:
        """Close the channel and end this engine's own controller, then vLLM's own shutdown."""
        if self._channel is not None:
            self._channel.close()
        self._control.close()
        super().shutdown()

    def _limits(self) -> EngineLimits:
        return EngineLimits(
            kv_capacity_tokens=kv_capacity_tokens(self.vllm_config, self.kv_cache_config, self.block_size),
            block_tokens=self.block_size,
            max_num_seqs=self.max_num_running_reqs,
            max_num_batched_tokens=self.max_num_scheduled_tokens,
            max_model_len=self.max_model_len,
            speculative_tokens=self.num_spec_tokens,
            pipeline_depth=self._depth,
        )
