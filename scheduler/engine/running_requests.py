"""The running requests as columns for a policy, and the work of a batch.

Part of the fence around vLLM's non-public surface (`Request`, `SchedulerOutput`): `tests/scheduler/test_vllm_seam.py`
fails when an upgrade moves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request

from scheduler.engine.admission_queue import AdmissionQueue
from scheduler.engine.lives import Life
from scheduler.policies import UNKNOWN_TYPE, RunningBatch, RunningRequest


class BatchWork(NamedTuple):
    """The work of one iteration: tokens computed by kind, KV tokens read, requests in the batch."""

    prefill_tokens: int
    decode_tokens: int
    kv_tokens: int
    batch_size: int


def batch_work(output: SchedulerOutput) -> BatchWork:
    """The work of an iteration that has just been scheduled."""
    counts, drafted = output.num_scheduled_tokens, output.scheduled_spec_decode_tokens
    total, prefilling = output.total_num_scheduled_tokens, []
    if drafted:  # a decode step has its draft tokens too
        prefilling = [n for name, n in counts.items() if n > 1 + len(drafted.get(name, ()))]
    elif total > len(counts):
        prefilling = [n for n in counts.values() if n > 1]
    prefill = sum(prefilling)
    # Tokens computed before, and those of this iteration.
    kv_tokens = sum(output.scheduled_cached_reqs.num_computed_tokens) + total
    kv_tokens += sum([new.num_computed_tokens for new in output.scheduled_new_reqs])
    return BatchWork(prefill, total - prefill, kv_tokens, len(counts))


def tokens_to_decode(running: list[Request]) -> int:
    """Tokens that the next decode steps of these requests compute: one each, and their drafts."""
    return len(running) + sum([len(request.spec_token_ids) for request in running])


def decode_steps(output: SchedulerOutput, results: Mapping[int, EngineCoreOutputs]) -> Iterator[tuple[int, int]]:
    """Tokens computed (with drafts) and gained, for each decoding request that gained tokens in an iteration."""
    counts, drafted = output.num_scheduled_tokens, output.scheduled_spec_decode_tokens
    first = {new.req_id for new in output.scheduled_new_reqs}
    for client in results.values():
        for answer in client.outputs:
            computed = counts.get(answer.request_id, 0)
            decoded = 0 < computed <= 1 + len(drafted.get(answer.request_id, ()))
            if decoded and answer.new_token_ids and answer.request_id not in first:
                yield computed, len(answer.new_token_ids)


class EngineBatch(RunningBatch):
    """Requests of the engine; `RunningRequest` objects are made only on access.

    step_tokens: most tokens that one decode step computes for a request, its drafts included.
    """

    __slots__ = ("_lives", "_queue", "_stages", "_step_tokens")
    _requests: list[Request]

    def __init__(
        self, requests: list[Request], queue: AdmissionQueue, lives: Mapping[str, Life], step_tokens: int = 1
    ) -> None:
        self._requests, self._queue, self._lives, self._step_tokens = requests, queue, lives, step_tokens
        self._stages: list[int] | None = None  # a policy may ask for them more than once

    def __getitem__(self, index: Any) -> Any:
        request = self._requests[index]
        under_way = request.num_output_placeholders
        return RunningRequest(
            request.request_id, self._queue.type_of(request.request_id) or UNKNOWN_TYPE,
            self.stages()[index], under_way, request.num_tokens + under_way,
        )

    def __iter__(self) -> Iterator[RunningRequest]:
        return (self[index] for index in range(len(self._requests)))

    def stages(self) -> list[int]:
        if self._stages is None:
            # A step under way yields one token for sure; its drafts may be rejected.
            self._stages = [
                0 if request.is_prefill_chunk
                else request.num_output_tokens - (-request.num_output_placeholders // self._step_tokens)
                for request in self._requests
            ]
        return self._stages

    def kv_tokens(self) -> list[int]:
        return [request.num_tokens + request.num_output_placeholders for request in self._requests]

    def shared_kv_tokens(self) -> list[int]:
        return [self._lives[request.request_id].shared_tokens for request in self._requests]

    def first_token_s(self) -> list[float]:
        return [self._lives[request.request_id].first_token_s for request in self._requests]

    def expected_output_tokens(self) -> list[float]:
        return [self._lives[request.request_id].expected for request in self._requests]

    def most_output_tokens(self) -> list[float]:
        return [self._lives[request.request_id].most for request in self._requests]


def in_admission_order(running: list[Request], paused: list[tuple[int, Request]]) -> list[Request]:
    """Put paused requests back in their places: vLLM preempts from the end, the latest admitted first."""
    if not paused:
        return running
    places = dict(paused)
    merged: list[Request] = []
    others = iter(running)
    place = 0
    for request in others:
        while place in places:
            merged.append(places.pop(place))
            place += 1
        merged.append(request)
        place += 1
    return merged + list(places.values())
