"""vLLM's real scheduler and block manager in this process, stepped by hand on a virtual clock; no weights, no GPU."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from scheduler.messages import Ack, Apply, Report, Telemetry
from scheduler.thresholds import parse_thresholds
from scheduler.vllm_scheduler import HeadraceScheduler
from simulator.engine.vllm_harness import drafted_requests, hand_drafts, make_scheduler

BLOCK = 16
STEP_S = 0.01
MAX_MODEL_LEN = 1024
_TOKEN, _STOP_TOKEN = 5, 2


@functools.cache
def _block_hasher() -> Any:
    init_none_hash(sha256)
    return get_request_block_hasher(BLOCK, sha256)


class AnythingGoes(StructuredOutputGrammar):
    """A compiled grammar that every token satisfies."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return tokens

    def rollback(self, num_tokens: int) -> None: ...

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None: ...

    def is_terminated(self) -> bool:
        return False

    def reset(self) -> None: ...


class Engine:
    """One scheduler, stepped as vLLM's engine core steps it: schedule one iteration ahead, then feed results back.

    batches: the scheduled tokens by request, one dict an iteration; finished: the requests that ended by themselves;
    `clock` moves by `STEP_S` an iteration. `drafts`: with speculative decoding, how many a decoding request has;
    `gains`: the tokens that a request has of a step with so many drafts.
    """

    def __init__(
        self, scheduler_cls: type[AsyncScheduler] = HeadraceScheduler, *, blocks: int = 256,
        thresholds: dict[str, Any] | None = None, settings: dict[str, Any] | None = None,
        drafts: int | None = None, gains: Callable[[str, int], int] = lambda name, drafts: 1, **engine_args: Any,
    ) -> None:
        self._drafts, self._gains = drafts, gains
        settings = dict(settings or {})
        if thresholds is not None:
            settings["thresholds"] = thresholds
        args = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 64, "max_num_batched_tokens": 512} | engine_args
        self.scheduler = make_scheduler(
            scheduler_cls, blocks=blocks, block_tokens=BLOCK, additional_config={"headrace": settings}, log_stats=True,
            **args,
        )
        self.now_s = 0.0
        if isinstance(self.scheduler, HeadraceScheduler):
            self.scheduler.clock = self.scheduler.arrival_clock = lambda: self.now_s
        self._block_hasher = _block_hasher() if self.scheduler.cache_config.enable_prefix_caching else None
        self.requests: dict[str, Request] = {}
        self.batches: list[dict[str, int]] = []
        self.first_scheduled: dict[str, float] = {}
        self.finished: dict[str, Request] = {}
        self.answers: list[Any] = []
        self.finished_s: dict[str, float] = {}
        self._in_flight: deque[tuple[Any, list[str], set[str]]] = deque()

    def add(
        self, request_id: str, *, prompt: int | list[int] = 32, output: int = 8, max_tokens: int | None = None,
        extra_args: dict[str, Any] | None = None, priority: int = 0, structured: bool = False,
        resumable: bool = False, on_its_way_s: float = 0.0,
    ) -> Request:
        """`output` tokens are produced; `max_tokens` is what the client asked for (the same unless given).

        The API process took the request in `on_its_way_s` ago.

        A `structured` request waits until `compile_grammar`. A `resumable` one is a session: the same id again is its
        next input.
        """
        request = Request(
            request_id=request_id, prompt_token_ids=[7] * prompt if isinstance(prompt, int) else prompt,
            pooling_params=None, priority=priority, arrival_time=self.now_s - on_its_way_s, resumable=resumable,
            block_hasher=self._block_hasher,
            sampling_params=SamplingParams(
                max_tokens=max_tokens or output, ignore_eos=True, extra_args=extra_args,
                structured_outputs=StructuredOutputsParams(regex="a*") if structured else None,
            ),
        )
        request.wanted_output = output
        self.requests.setdefault(request_id, request)
        self.scheduler.add_request(request)
        return request

    def compile_grammar(self, request_id: str) -> None:
        """What the compiling thread does when it is done."""
        self.requests[request_id].structured_output_request.grammar = AnythingGoes()

    def abort(self, request_id: str) -> None:
        """What the engine core does when a client disconnects."""
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.requests.pop(request_id, None)

    def apply(self, thresholds: dict[str, Any], *, automatic: bool = True) -> Ack:
        """What the channel's thread does with thresholds that arrive."""
        return self.scheduler.active.offer(Apply(thresholds=parse_thresholds(thresholds), automatic=automatic))

    @property
    def running(self) -> list[str]:
        return [request.request_id for request in self.scheduler.running]

    def step(self) -> dict[str, int]:
        """One iteration of `STEP_S` seconds; returns the scheduled tokens by request."""
        batch = self.launch()
        if len(self._in_flight) > 1:
            self.deliver()
        self.now_s += STEP_S
        return batch

    def steps(self, times: int) -> list[dict[str, int]]:
        return [self.step() for _ in range(times)]

    def launch(self) -> dict[str, int]:
        """Schedule an iteration and hand it to the device."""
        output = self.scheduler.schedule()
        for name in output.num_scheduled_tokens:
            self.first_scheduled.setdefault(name, self.now_s)
        self.batches.append(dict(output.num_scheduled_tokens))
        names = list(output.num_scheduled_tokens)
        producing = {n for n in names if not self.requests[n].is_prefill_chunk}
        self._in_flight.append((output, names, producing))
        return self.batches[-1]

    def deliver(self) -> None:
        """The results of the oldest iteration in flight come back."""
        output, names, producing = self._in_flight.popleft()
        drafted = drafted_requests(output) if self._drafts is not None else {}
        sampled = [
            [self._token_for(name)] * (self._gains(name, drafted[name]) if name in drafted else 1)
            if name in producing else [] for name in names
        ]
        outputs = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names, req_id_to_index={n: i for i, n in enumerate(names)}, sampled_token_ids=sampled
            ),
        )
        if self._drafts is not None:
            hand_drafts(self.scheduler, output, self._drafts)
        self.answers += [answer for client in outputs.values() for answer in client.outputs]
        for name in names:
            if name in self.requests and self.requests[name].is_finished():
                self.finished[name] = self.requests.pop(name)
                self.finished_s[name] = self.now_s

    def _token_for(self, name: str) -> int:
        """The model ends an answer by itself where less is wanted than the client allowed."""
        request = self.requests.get(name)
        if request is None or request.wanted_output >= request.max_tokens:
            return _TOKEN
        if request.num_output_tokens + 1 < request.wanted_output:
            return _TOKEN
        request.sampling_params.stop_token_ids = [_STOP_TOKEN]
        return _STOP_TOKEN

    def run(self, most_steps: int = 10_000) -> None:
        """Step until all requests have finished.

        Raises:
            AssertionError: a request is unfinished after `most_steps`.
        """
        for _ in range(most_steps):
            if not self.scheduler.has_unfinished_requests():
                while self._in_flight:
                    self.deliver()
                return
            self.step()
        raise AssertionError(f"stranded: {sorted(self.requests)}")


def add_many(engine: Engine, count: int, prefix: str = "r", **request: Any) -> list[str]:
    """Add `count` equal requests; their names."""
    names = [f"{prefix}{place}" for place in range(count)]
    for name in names:
        engine.add(name, **request)
    return names


def telemetry(engine: Engine, cursor: int = 0) -> Telemetry:
    """The engine's report of the records after `cursor`."""
    return engine.scheduler.telemetry(Report(cursor=cursor))


def fluid_params(**fields: Any) -> dict[str, Any]:
    """JSON of `FluidParams` for outputs of 50 tokens."""
    return {
        "time_model": {
            "d0_s": 4e-3, "d1_s_per_kv_token": 1e-6, "d2_s_per_prefill_token": 1e-4, "d3_s_per_decode_token": 1e-4,
        },
        "survival": [[0, 1.0], [49, 1.0], [50, 0.0]], "kv_limit_tokens": 256 * BLOCK, **fields,
    }


def wait(n: int = 8, **fields: Any) -> dict[str, Any]:
    """JSON of WAIT's thresholds: one type, groups of `n`."""
    return {"policy": "wait", "types": [{"name": "all", "n": n}], **fields}


def nested(*ends_and_n: tuple[int, int], **fields: Any) -> dict[str, Any]:
    """JSON of Nested WAIT's thresholds: one segment for each (last output token, requests a stage)."""
    starts = (0, *(end for end, _ in ends_and_n))
    return {
        "policy": "nested_wait",
        "segments": [
            {"end_output_tokens": end, "total": n * (end - start)}
            for (end, n), start in zip(ends_and_n, starts, strict=False)
        ],
        **fields,
    }


def boundary_engine(**fields: Any) -> tuple[Engine, list[str]]:
    """An engine with two requests that reach the boundary after four tokens; four that come later keep it busy."""
    engine = Engine(thresholds=nested((4, 4), (1000, 4), **fields))
    front = add_many(engine, 2, "front", output=12)
    return engine, front
