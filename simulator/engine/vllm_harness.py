"""vLLM's scheduler and KV block manager in this process, without an engine, weights or an accelerator.

This module is the simulator's fence around vLLM's non-public surface: how a scheduler, a request and an iteration's
results are made by hand. `tests/simulator/engine/test_vllm_harness_seam.py` fails when an upgrade moves any of it.
Source: `vllm.v1.engine.core.EngineCore`, which makes and steps the same objects.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from scheduler.settings import SETTINGS_KEY

# Scheduling does not depend on the model's shape, so the smallest one that vLLM accepts is used.
_HEADS, _HEAD_SIZE = 4, 16
_MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": _HEADS * _HEAD_SIZE,
    "intermediate_size": 128, "num_attention_heads": _HEADS, "num_hidden_layers": 2, "num_key_value_heads": _HEADS,
    "vocab_size": 1000, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}
_NOT_ASKED_FOR = [5]

_AnyScheduler = TypeVar("_AnyScheduler", bound=Scheduler)
BlockHasher = Callable[[Request], list[Any]]


@functools.cache
def _model_folder(max_model_len: int) -> str:
    folder = Path(tempfile.mkdtemp(prefix="headrace-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "config.json").write_text(json.dumps(_MODEL | {"max_position_embeddings": max_model_len}))
    return str(folder)


def make_scheduler(
    scheduler_cls: type[_AnyScheduler], *, blocks: int, block_tokens: int = 16, max_model_len: int = 4096,
    additional_config: dict[str, Any] | None = None, log_stats: bool = False, **engine_args: Any,
) -> _AnyScheduler:
    """A scheduler as an engine core would make it, over `blocks` KV blocks of `block_tokens` tokens.

    `engine_args` are vLLM's own engine arguments, such as max_num_seqs and max_num_batched_tokens; settings that vLLM
    rejects raise its own ValueError.
    """
    engine_args = {"enable_prefix_caching": False, "async_scheduling": True} | engine_args
    config: VllmConfig = EngineArgs(
        model=_model_folder(max_model_len), skip_tokenizer_init=True, max_model_len=max_model_len,
        block_size=block_tokens, enforce_eager=True, dtype="bfloat16", num_gpu_blocks_override=blocks,
        additional_config=_tuned_from_here(additional_config or {}), **engine_args,
    ).create_engine_config()
    # vLLM's CPU platform switches it off, whatever the arguments say.
    config.scheduler_config.async_scheduling = engine_args["async_scheduling"]
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(
        block_size=block_tokens, num_kv_heads=_HEADS, head_size=_HEAD_SIZE, dtype=torch.bfloat16
    )
    kv = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    with _accelerator_s_model_runner(config):
        scheduler: _AnyScheduler = scheduler_cls(
            vllm_config=config, kv_cache_config=kv, block_size=block_tokens, hash_block_size=block_tokens,
            log_stats=log_stats, structured_output_manager=StructuredOutputManager(config),
        )
    return scheduler


def _tuned_from_here(additional_config: dict[str, Any]) -> dict[str, Any]:
    """The same, for an engine that starts no controller process of its own: it lives in virtual time."""
    return additional_config | {SETTINGS_KEY: {"controller": None} | additional_config.get(SETTINGS_KEY, {})}


@contextmanager
def _accelerator_s_model_runner(config: VllmConfig) -> Iterator[None]:
    """With pipeline stages and asynchronous scheduling: what vLLM's model runner for accelerators (V2) asks of a
    scheduler, namely a step of each request once in as many iterations. There is none on a CPU."""
    name = "VLLM_USE_V2_MODEL_RUNNER"
    if name in os.environ or config.parallel_config.pipeline_parallel_size == 1:
        yield
        return
    os.environ[name] = "1" if config.scheduler_config.async_scheduling else "0"
    try:
        yield
    finally:
        del os.environ[name]


def block_hasher_of(scheduler: Scheduler) -> BlockHasher | None:
    """What hashes the blocks of this scheduler's requests, for `make_request`; None without prefix caching."""
    cache = scheduler.cache_config
    if not cache.enable_prefix_caching:
        return None
    hasher: BlockHasher = get_request_block_hasher(
        scheduler.block_size, _hash_function(cache.prefix_caching_hash_algo)
    )
    return hasher


@functools.cache  # the first block's parent hash is set once for the process
def _hash_function(name: str) -> Callable[[Any], bytes]:
    function: Callable[[Any], bytes] = get_hash_fn_by_name(name)
    init_none_hash(function)
    return function


@functools.cache
def _undeclared(max_model_len: int) -> SamplingParams:
    """What a client sends that says nothing of its answer's length; one object serves all requests."""
    return SamplingParams(max_tokens=max_model_len, ignore_eos=True)


def make_request(
    request_id: str, prompt_token_ids: list[int], output_tokens: int, *, arrival_s: float, max_model_len: int,
    declared: dict[str, Any] | None = None, block_hasher: BlockHasher | None = None,
) -> Request:
    """A request that ends after `output_tokens`; `declared` are the extra arguments in which its client says so.

    `block_hasher` is `block_hasher_of` its scheduler.
    """
    params = _undeclared(max_model_len)
    if declared:
        params = SamplingParams(max_tokens=max_model_len, ignore_eos=True, extra_args=declared)
    request = Request(
        request_id=request_id, prompt_token_ids=prompt_token_ids, sampling_params=params, pooling_params=None,
        arrival_time=arrival_s, block_hasher=block_hasher,
    )
    # The length is the model's to know: vLLM's own stop check sees it here, a scheduler reads the client's parameters.
    request.max_tokens = output_tokens
    return request


def iteration_results(
    output: SchedulerOutput, silent: Collection[str], answers: Mapping[str, list[int]] | None = None,
    gained: Mapping[str, int] | None = None,
) -> ModelRunnerOutput:
    """What the model answers to a scheduled iteration: one token a request, none for the `silent` ones.

    `answers`: by request, that token in a list; a request that is not in it, as it has left meanwhile, gets any.
    `gained`: how many of it, for requests that had drafts.
    """
    names = list(output.num_scheduled_tokens)
    place = dict(zip(names, range(len(names)), strict=True))
    answers = answers or {}
    sampled = [answers.get(name, _NOT_ASKED_FOR) for name in names]
    for name, tokens in (gained or {}).items():
        sampled[place[name]] = sampled[place[name]] * tokens
    for name in silent:
        sampled[place[name]] = []
    return ModelRunnerOutput(req_ids=names, req_id_to_index=place, sampled_token_ids=sampled)


def drafted_requests(output: SchedulerOutput) -> dict[str, int]:
    """Draft tokens that an iteration verifies, by request.

    A request that begins or comes back has none: vLLM pads it to the size of the others.
    """
    padded = {new.req_id for new in output.scheduled_new_reqs} | set(output.scheduled_cached_reqs.resumed_req_ids)
    return {
        name: len(drafts) for name, drafts in output.scheduled_spec_decode_tokens.items() if name not in padded
    }


def hand_drafts(scheduler: Scheduler, output: SchedulerOutput, draft_tokens: int) -> None:
    """So many drafts for each request of a finished iteration, as `EngineCore.post_step` hands a drafter's on.

    With asynchronous scheduling the drafts stay on the device, and vLLM's scheduler counts on all of them by itself.
    """
    if not scheduler.scheduler_config.async_scheduling:
        names = list(output.num_scheduled_tokens)
        scheduler.update_draft_token_ids(DraftTokenIds(names, [_NOT_ASKED_FOR * draft_tokens for _ in names]))
