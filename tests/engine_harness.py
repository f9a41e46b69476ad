"""vLLM's real scheduler and block manager in this process, stepped by hand on a virtual clock; no weights, no GPU."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from scheduler.vllm_scheduler import HeadraceScheduler

BLOCK = 16
STEP_S = 0.01
_MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 4, "vocab_size": 1000,
    "max_position_embeddings": 1024, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}


@functools.cache
def _model_folder() -> str:
    folder = Path(tempfile.mkdtemp(prefix="headrace-test-"))
    (folder / "config.json").write_text(json.dumps(_MODEL))
    return str(folder)


def engine_config(*, blocks: int, additional_config: dict[str, Any] | None = None, **engine_args: Any) -> VllmConfig:
    args = {
        "max_model_len": 1024, "max_num_seqs": 64, "max_num_batched_tokens": 512, "enable_prefix_caching": False,
    } | engine_args
    config = EngineArgs(
        model=_model_folder(), skip_tokenizer_init=True, block_size=BLOCK, enforce_eager=True, dtype="bfloat16",
        num_gpu_blocks_override=blocks, async_scheduling=True, additional_config=additional_config or {}, **args,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = blocks
    return config


class Engine:
    """One scheduler, stepped as vLLM's engine core steps it: schedule one iteration ahead, then feed results back."""

    def __init__(
        self, scheduler_cls: type[AsyncScheduler] = HeadraceScheduler, *, blocks: int = 256,
        thresholds: dict[str, Any] | None = None, allow_strict: bool = False, **engine_args: Any,
    ) -> None:
        settings: dict[str, Any] = {"allow_strict": allow_strict}
        if thresholds is not None:
            settings["thresholds"] = thresholds
        config = engine_config(blocks=blocks, additional_config={"headrace": settings}, **engine_args)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=4, head_size=16, dtype=torch.bfloat16)
        kv = KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        self.scheduler = scheduler_cls(
            vllm_config=config, kv_cache_config=kv, block_size=BLOCK, hash_block_size=BLOCK, log_stats=True,
            structured_output_manager=StructuredOutputManager(config),
        )
        self.now_s = 0.0
        if isinstance(self.scheduler, HeadraceScheduler):
            self.scheduler.clock = lambda: self.now_s
        self.requests: dict[str, Request] = {}
        self.batches: list[dict[str, int]] = []
        self.first_scheduled: dict[str, float] = {}
        self.finished_s: dict[str, float] = {}
        self._in_flight: list[Any] = []

    def add(
        self, request_id: str, *, prompt: int = 32, output: int = 8, max_tokens: int | None = None,
        extra_args: dict[str, Any] | None = None, priority: int = 0,
    ) -> Request:
        """`output` tokens are produced; `max_tokens` is what the client asked for (the same unless given)."""
        request = Request(
            request_id=request_id, prompt_token_ids=[7] * prompt, pooling_params=None, priority=priority,
            arrival_time=self.now_s,
            sampling_params=SamplingParams(max_tokens=max_tokens or output, ignore_eos=True, extra_args=extra_args),
        )
        request.wanted_output = output
        self.requests[request_id] = request
        self.scheduler.add_request(request)
        return request

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.requests.pop(request_id, None)

    def step(self) -> dict[str, int]:
        """One iteration of `STEP_S` seconds; returns the scheduled tokens by request."""
        output = self.scheduler.schedule()
        for name in output.num_scheduled_tokens:
            self.first_scheduled.setdefault(name, self.now_s)
        self.batches.append(dict(output.num_scheduled_tokens))
        names = list(output.num_scheduled_tokens)
        producing = {n for n in names if not self.requests[n].is_prefill_chunk}
        self._in_flight.append((output, names, producing))
        if len(self._in_flight) > 1:
            self._deliver()
        self.now_s += STEP_S
        return self.batches[-1]

    def _deliver(self) -> None:
        output, names, producing = self._in_flight.pop(0)
        sampled = []
        for name in names:
            request = self.requests.get(name)
            last = request is not None and request.num_output_tokens + 1 >= request.wanted_output
            sampled.append(([2] if last and request.max_tokens > request.wanted_output else [5]) if name in producing
                           else [])
            if last and request.max_tokens > request.wanted_output:
                request.sampling_params.stop_token_ids = [2]
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(req_ids=names, req_id_to_index={n: i for i, n in enumerate(names)},
                              sampled_token_ids=sampled),
        )
        for name in names:
            if name in self.requests and self.requests[name].is_finished():
                self.finished_s[name] = self.now_s
                del self.requests[name]

    def run(self, most_steps: int = 10_000) -> None:
        """Step until everybody has finished."""
        for _ in range(most_steps):
            if not self.scheduler.has_unfinished_requests() and not self._in_flight:
                return
            self.step()
            if not self.scheduler.has_unfinished_requests():
                while self._in_flight:
                    self._deliver()
                return
        raise AssertionError(f"stranded: {sorted(self.requests)}")
