"""One virtual replica: vLLM's scheduler stepped as its engine core steps it, on a virtual clock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from scheduler.engine.running_requests import batch_work, decode_steps
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.rejection import Rejection
from scheduler.tuning.slo import Slo
from scheduler.vllm_scheduler import HeadraceScheduler
from simulator.engine.replica_state import ExecutingIteration, LiveRequest, Sink, Totals
from simulator.engine.vllm_harness import (
    block_hasher_of,
    drafted_requests,
    hand_drafts,
    iteration_results,
    make_request,
)
from simulator.output.rows import COMPLETED, GAVE_UP, REJECTED, UNFINISHED, IterationRow, RequestRow
from simulator.scenario.admission_baselines import AdmissionRule, ReplicaLoad
from simulator.scenario.slowdown import Slowdown
from simulator.scenario.speculation import Speculation
from simulator.workload.clients import Attempt, Returns
from simulator.workload.prompts import answer_token_id, prompt_token_ids
from simulator.workload.requests import SimRequest


class VirtualReplica:
    """A scheduler with its requests, iterations in flight, and virtual clock `now_s`.

    It keeps `depth` iterations under way: one for each pipeline stage, and with asynchronous scheduling one more, which
    is scheduled already. A batch passes the stages one after the other, each with an equal part of the modelled time; a
    request's step starts when its previous token is there. `give_up_s`: seconds without a first token after which the
    client leaves. `rule`: may reject requests when they arrive, given the target `ttft_s`. `speed`: of the device,
    relative to the model; `slowdown`: when it is slow; `noise`: a factor of each iteration's time. `returns` gets each
    rejection and decides whether the request is retried; one that is has no row yet. `never_rejected`: numbers of
    requests that no rule may reject. `speculation`: draft tokens of decoding requests, on a scheduler made for as many.
    """

    def __init__(
        self,
        index: int,
        scheduler: Scheduler,
        time_model: IterationTimeModel,
        sink: Sink,
        *,
        give_up_s: float | None = None,
        rule: AdmissionRule | None = None,
        ttft_s: float | None = None,
        slowdown: Slowdown | None = None,
        speed: float = 1.0,
        noise: Callable[[], float] | None = None,
        returns: Returns | None = None,
        never_rejected: Collection[int] = (),
        speculation: Speculation | None = None,
    ) -> None:
        self._noise, self._speculation = noise, speculation
        self.index, self.scheduler, self.now_s, self.totals = index, scheduler, 0.0, Totals()
        self._time_model, self._sink, self._give_up_s = time_model, sink, give_up_s
        self._rule, self._ttft_s, self._slowdown, self._speed = rule, ttft_s, slowdown, speed
        self.ended: Callable[[int, int], None] | None = None
        """Called with this replica's index and a request's number when the request is over here."""
        self._returns, self._never_rejected = returns, frozenset(never_rejected)
        self._block_hasher = block_hasher_of(scheduler)
        self._answers: dict[str, list[int]] = {}
        self._prefilling: dict[str, int] = {}
        self._stages: int = scheduler.parallel_config.pipeline_parallel_size
        self._stage_time_model = time_model.of_stage(self._stages)
        self._depth = self._stages + bool(scheduler.scheduler_config.async_scheduling)
        self.headrace = scheduler if isinstance(scheduler, HeadraceScheduler) else None
        if self.headrace:
            self.headrace.clock = self.headrace.arrival_clock = lambda: self.now_s
            self.headrace.rejector.never = {str(number) for number in self._never_rejected}
        self._live: dict[str, LiveRequest] = {}
        self._rejected: dict[str, LiveRequest] = {}
        self._giving_up: str | None = None
        self._in_flight: deque[ExecutingIteration] = deque()
        self._stage_free_s = [0.0] * self._stages
        self._token_there_s: dict[str, float] = {}
        self._catching_up: dict[str, LiveRequest] = {}
        self._without_token: deque[LiveRequest] = deque()
        self._nothing_more = self._stuck = False
        watch(scheduler, self)

    @property
    def ongoing(self) -> int:
        """Requests submitted and not over yet."""
        return len(self._live)

    @property
    def queued(self) -> int:
        """Requests that wait in the engine."""
        return len(self.scheduler.waiting) + len(self.scheduler.skipped_waiting)

    @property
    def kv_used_fraction(self) -> float:
        """Share of the KV cache in use."""
        return float(self.scheduler.kv_cache_manager.usage)

    @property
    def moves(self) -> bool:
        """Whether anything will happen though nothing arrives any more."""
        return bool(self._in_flight) or (bool(self._live) and not self._stuck)

    def submit(
        self, number: int, request: SimRequest, *, declared: dict[str, Any] | None = None,
        attempt: Attempt | None = None, reached_s: float = 0.0,
    ) -> None:
        """A request reaches the engine now; `declared` are the arguments that declare its output length.

        `attempt`: this is a retry after a rejection. `reached_s`: when it came here, if it has waited elsewhere.
        """
        since_s = attempt.at_s if attempt else request.arrival_s
        reached_s = max(since_s, reached_s)
        self.now_s, self._stuck = max(self.now_s, reached_s), False
        made = make_request(
            f"{number}.{attempt.number}" if attempt else str(number),
            prompt_token_ids(request.pieces, request.prompt_tokens, number), request.output_tokens,
            arrival_s=reached_s, max_model_len=self.scheduler.max_model_len, declared=declared,
            block_hasher=self._block_hasher,
        )
        live = LiveRequest(number, made, request, since_s, attempt)
        if self._rule and number not in self._never_rejected and not self._rule(self._load()):
            self._reject(live, None)
            return
        self._live[made.request_id] = live
        self._answers[made.request_id] = [answer_token_id(request.answer, number)]
        self._prefilling[made.request_id] = request.prompt_tokens
        if self._give_up_s is not None:
            self._without_token.append(live)
        self.scheduler.add_request(made)

    def advance(self, until_s: float) -> None:
        """Run iterations until `until_s`."""
        while True:
            if len(self._in_flight) < self._depth and not self._nothing_more and self._live:
                if self.now_s >= until_s:
                    return
                if self._launch() or self._launch():  # a second try runs requests that are all held
                    continue
                self._nothing_more = bool(self._in_flight)
                if self._rejected and not self._in_flight:
                    self._deliver_rejections(self._update(self._empty, ()))
                if not self._in_flight and not self._sleep(until_s):
                    self._stuck = not any(end > self.now_s for end in self._holds_end_s())
                    return
            elif self._in_flight and self._in_flight[0].ends_s <= until_s:
                self._deliver()
            else:
                return

    def finish(self) -> list[int]:
        """Run until no request can progress; returns the numbers of the stranded requests."""
        self.advance(math.inf)
        return [live.number for live in self._live.values()]

    def undecided(self, measured: range, now_s: float, targets: Slo) -> bool:
        """Whether a request numbered in `measured` is under way and may still meet the targets."""
        return any(live.number in measured and live.can_meet(now_s, targets) for live in self._live.values())

    def leave_unfinished(self) -> int:
        """Record the requests under way as unfinished, at the end of the run; returns their number."""
        for live in self._rejected.values():
            self._sink.request(self._request_row(live, REJECTED, rejected_s=self.now_s))
        for live in self._live.values():
            self._sink.request(self._request_row(live, UNFINISHED))
        return len(self._live)

    # One iteration.

    def _launch(self) -> bool:
        """Schedule one iteration and hand it to the device; False when there is nothing to run."""
        self._give_up()
        output = self.scheduler.schedule()
        for name in output.preempted_req_ids or ():
            self._catching_up[name] = self._live[name]
        if not output.total_num_scheduled_tokens:
            self._empty = output
            return self._stages > 1 and self._queue_empty(output)
        for new in output.scheduled_new_reqs:
            live = self._catching_up[new.req_id] = self._live[new.req_id]
            if live.cached_tokens is None:
                live.cached_tokens = new.num_computed_tokens
        tokens_there_s = self._tokens_there_s(output)
        silent, first_tokens = self._token_producers(output)
        work = self.headrace.latest_work if self.headrace else batch_work(output)
        seconds = self._stage_time_model.iteration_s(work.prefill_tokens, work.decode_tokens, work.kv_tokens)
        starts_s = max(self.now_s, self._stage_free_s[0], tokens_there_s)
        seconds /= self._speed
        if self._slowdown:
            seconds *= self._slowdown.factor_at(starts_s)
        if self._noise:
            seconds *= self._noise()
        ends_s = self._run_through(output, starts_s, seconds)
        self._in_flight.append(ExecutingIteration(output, silent, first_tokens, ends_s))

        totals, usage = self.totals, self.kv_used_fraction
        totals.iterations += 1
        totals.kv_peak_fraction = max(totals.kv_peak_fraction, usage)
        if self._sink.wants_iterations:
            self._sink.iteration(self._iteration_row(starts_s, seconds, work, usage))
        return True

    def _run_through(self, output: SchedulerOutput, starts_s: float, seconds: float) -> float:
        """The batch enters a stage when it has left the one before and the stage is free; returns when it ends."""
        ends_s = starts_s
        for stage, free_s in enumerate(self._stage_free_s):
            ends_s = self._stage_free_s[stage] = max(ends_s, free_s) + seconds
        if self._stages > 1:
            self._token_there_s.update(dict.fromkeys(output.num_scheduled_tokens, ends_s))
        return ends_s

    def _tokens_there_s(self, output: SchedulerOutput) -> float:
        """When the previous tokens of this batch's decodes are there; prefill chunks need none."""
        if self._stages == 1:
            return 0.0
        decoding = [name for name in output.num_scheduled_tokens if name not in self._catching_up]
        return max((self._token_there_s.get(name, 0.0) for name in decoding), default=0.0)

    def _queue_empty(self, output: SchedulerOutput) -> bool:
        """vLLM's engine core queues an empty batch behind those under way; it counts as a group's turn."""
        if not self._in_flight:
            return False
        self._in_flight.append(ExecutingIteration(output, [], [], self._in_flight[-1].ends_s))
        return True

    def _token_producers(self, output: SchedulerOutput) -> tuple[list[str], list[LiveRequest]]:
        """Which requests of the batch get no token yet, and which get their first."""
        counts, silent, first_tokens, done = output.num_scheduled_tokens, [], [], []
        for name, live in self._catching_up.items():
            if name not in counts:
                continue
            if live.request.is_prefill_chunk:
                silent.append(name)
                continue
            done.append(name)
            if live.first_token_s is None:
                first_tokens.append(live)
        for name in done:
            del self._catching_up[name]
        return silent, first_tokens

    def _deliver(self) -> None:
        """The results of the oldest iteration come back."""
        executing = self._in_flight.popleft()
        self.now_s = max(self.now_s, executing.ends_s)
        self._nothing_more = False
        for live in executing.first_tokens:
            live.first_token_s = executing.ends_s
            self._prefilling.pop(live.request.request_id, None)
        outputs = self._update(executing.output, executing.silent)
        if self._rejected:
            self._deliver_rejections(outputs)

    def _update(self, output: SchedulerOutput, silent: Collection[str]) -> Any:
        speculation = self._speculation
        if speculation is None:
            return self.scheduler.update_from_output(output, iteration_results(output, silent, self._answers))
        drafted = drafted_requests(output)
        gained = {name: speculation.gained_tokens(name, drafts) for name, drafts in drafted.items()}
        results = self.scheduler.update_from_output(output, iteration_results(output, silent, self._answers, gained))
        hand_drafts(self.scheduler, output, speculation.draft_tokens)
        for _, tokens in decode_steps(output, results):
            self.totals.decode_steps += 1
            self.totals.gained_tokens += tokens
        return results

    def _deliver_rejections(self, outputs: Any) -> None:
        """Clients get a rejection with an iteration's results, as the scheduler returns it."""
        answers = [answer for client in outputs.values() for answer in client.outputs]
        said = {
            answer.request_id: Rejection.of_answer(str(answer.finish_reason), answer.stop_reason)
            for answer in answers if answer.request_id in self._rejected
        }
        for live in sorted((self._rejected.pop(name) for name in said), key=lambda live: live.number):
            self._reject(live, said[live.request.request_id])

    def _reject(self, live: LiveRequest, rejection: Rejection | None) -> None:
        attempt, retry_after_s = live.attempt, rejection.retry_after_s if rejection else None
        if self._returns and self._returns.rejected(
            live.number, live.sent, attempt.number if attempt else 0, bool(attempt and attempt.as_advised), self.now_s,
            retry_after_s,
        ):
            return
        self.totals.rejected += 1
        self._sink.request(self._request_row(live, REJECTED, rejected_s=self.now_s))

    def _sleep(self, until_s: float) -> bool:
        """Idle: advance to the end of the next hold. False when none ends before `until_s`."""
        ends = [end for end in self._holds_end_s() if end > self.now_s]
        if not ends or min(ends) >= until_s:
            return False
        self.now_s = min(ends)
        return True

    def _holds_end_s(self) -> Iterator[float]:
        if self.headrace and not self.headrace.active.current().policy.strict:
            hold_s = self.headrace.active.current().thresholds.max_hold_s
            yield from (view.oldest_since_s + hold_s for view in self.headrace.admission_queue.views().values())
        if self._give_up_s is not None and self._without_token:
            yield self._without_token[0].since_s + self._give_up_s

    def _give_up(self) -> None:
        if self._give_up_s is None:
            return
        while self._without_token:
            oldest = self._without_token[0]
            waiting = oldest.request.status == RequestStatus.WAITING
            if waiting and self.now_s - oldest.since_s < self._give_up_s:
                return
            self._without_token.popleft()
            if waiting:
                self._giving_up = oldest.request.request_id
                self.scheduler.finish_requests(oldest.request.request_id, RequestStatus.FINISHED_ABORTED)

    # Called by the scheduler about its requests (see `watch`).

    def preempted(self, request: Request) -> None:
        """A request loses its KV cache and will compute it again."""
        self.totals.preemptions += 1
        self.totals.recomputed_tokens += request.num_computed_tokens

    def left(self, request: Request) -> None:
        """A request leaves the engine: finished, rejected or given up."""
        live = self._live.pop(request.request_id)
        if self.ended:
            self.ended(self.index, live.number)
        del self._answers[request.request_id]
        if self._speculation:
            self._speculation.forget(request.request_id)
        self._prefilling.pop(request.request_id, None)
        self._catching_up.pop(request.request_id, None)
        self._token_there_s.pop(request.request_id, None)
        if request.num_output_tokens > 0:
            self._sink.request(self._request_row(live, COMPLETED))
        elif request.request_id == self._giving_up:
            self._sink.request(self._request_row(live, GAVE_UP))
        else:
            self._rejected[request.request_id] = live

    def _request_row(self, live: LiveRequest, outcome: str, rejected_s: float | None = None) -> RequestRow:
        request, attempt = live.request, live.attempt
        return RequestRow(
            index=live.number, replica=self.index, type=live.sent.type_name, arrival_s=live.sent.arrival_s,
            first_token_s=live.first_token_s, finished_s=self.now_s if outcome == COMPLETED else None,
            prompt_tokens=request.num_prompt_tokens, output_tokens=request.num_output_tokens,
            preemptions=request.num_preemptions, outcome=outcome, rejected_s=rejected_s,
            cached_tokens=live.cached_tokens, attempts=1 + (attempt.number if attempt else 0),
            returned_s=attempt.at_s if attempt else None,
        )

    def _load(self) -> ReplicaLoad:
        return ReplicaLoad(
            waiting=self.queued, time_model=self._time_model, ttft_s=self._ttft_s,
            prefill_tokens=sum(self._prefilling.values()), kv_used_fraction=self.kv_used_fraction,
        )

    def _iteration_row(self, starts_s: float, seconds: float, work: Any, usage: float) -> IterationRow:
        scheduler, gauges, thresholds = self.scheduler, None, None
        if self.headrace:
            gauges, thresholds = self.headrace.recorder.gauges, self.headrace.active.current().thresholds
        return IterationRow(
            replica=self.index, start_s=starts_s, seconds=seconds, prefill_tokens=work.prefill_tokens,
            decode_tokens=work.decode_tokens, kv_read_tokens=work.kv_tokens,
            kv_used_tokens=round(usage * scheduler.cache_config.num_gpu_blocks * scheduler.block_size),
            batch_size=work.batch_size, running=len(scheduler.running),
            waiting=self.queued,
            held=gauges.held if gauges else 0, sitting_out=gauges.sitting_out if gauges else 0,
            max_running=thresholds.max_running if thresholds else scheduler.max_num_running_reqs,
            token_budget=(thresholds and thresholds.token_budget) or scheduler.max_num_scheduled_tokens,
        )


def watch(scheduler: Scheduler, replica: VirtualReplica) -> None:
    """Make `scheduler` call `replica` for requests that are preempted or leave, before their state is dropped.

    vLLM reports neither a preempted request's lost tokens nor, without a scan of every output, which requests ended.
    """
    preempt, free = scheduler._preempt_request, scheduler._free_request

    def preempt_and_record(request: Request, *args: Any, **kwargs: Any) -> None:
        replica.preempted(request)
        preempt(request, *args, **kwargs)

    def free_and_record(request: Request, *args: Any, **kwargs: Any) -> Any:
        replica.left(request)
        return free(request, *args, **kwargs)

    scheduler._preempt_request, scheduler._free_request = preempt_and_record, free_and_record
