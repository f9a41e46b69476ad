"""The simulator's fence around vLLM: an upgrade that moves anything it makes, reads or replaces fails here, by name."""

import inspect
from dataclasses import fields

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from scheduler.settings import EXPECTED_OUTPUT_TOKENS
from scheduler.vllm_scheduler import HeadraceScheduler
from simulator.engine.replica import watch
from simulator.engine.vllm_harness import (
    block_hasher_of,
    drafted_requests,
    hand_drafts,
    iteration_results,
    make_request,
    make_scheduler,
)
from simulator.engine.vllm_v0 import VllmV0Scheduler

BLOCK = 16
MAX_MODEL_LEN = 1024


def scheduler_of(scheduler_cls=Scheduler, *, blocks=65, **engine_args):
    args = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "async_scheduling": False} | engine_args
    return make_scheduler(scheduler_cls, blocks=blocks, block_tokens=BLOCK, max_model_len=MAX_MODEL_LEN, **args)


def add(scheduler, name, prompt=32, output=4, declared=None):
    request = make_request(
        name, [7] * prompt if isinstance(prompt, int) else prompt, output, arrival_s=0.0, max_model_len=MAX_MODEL_LEN,
        declared=declared, block_hasher=block_hasher_of(scheduler),
    )
    scheduler.add_request(request)
    return request


def iterate(scheduler, silent=None):
    """One iteration, results and all; `silent` None: the requests that vLLM says are in the middle of their prompts."""
    output = scheduler.schedule()
    if silent is None:
        silent = [name for name in output.num_scheduled_tokens if scheduler.requests[name].is_prefill_chunk]
    scheduler.update_from_output(output, iteration_results(output, silent))
    return output


class Watching:
    """What `watch` tells, and the request's state when it does."""

    def __init__(self, scheduler):
        self.lost, self.gone = [], []
        watch(scheduler, self)

    def preempted(self, request):
        self.lost.append((request.request_id, request.num_computed_tokens, request.num_preemptions))

    def left(self, request):
        self.gone.append((request.request_id, request.num_output_tokens, request.status.name))


# Making a scheduler.


def test_scheduler_constructor_takes_what_we_pass():
    parameters = inspect.signature(Scheduler.__init__).parameters
    given = {
        "vllm_config", "kv_cache_config", "block_size", "hash_block_size", "log_stats", "structured_output_manager",
    }
    assert given <= set(parameters)
    required = {name for name, p in parameters.items() if p.default is p.empty and name != "self"}
    assert required <= given


def test_an_engine_s_parts_are_made_of_what_we_pass():
    arguments = {
        "model", "skip_tokenizer_init", "max_model_len", "block_size", "enforce_eager", "dtype",
        "num_gpu_blocks_override", "additional_config", "enable_prefix_caching", "async_scheduling",
    }
    assert arguments <= {field.name for field in fields(EngineArgs)}
    assert {"block_size", "num_kv_heads", "head_size", "dtype"} <= set(inspect.signature(FullAttentionSpec).parameters)
    made = {"num_blocks", "kv_cache_tensors", "kv_cache_groups"}
    assert made <= set(inspect.signature(KVCacheConfig).parameters)
    assert list(inspect.signature(KVCacheGroupSpec).parameters)[:2] == ["layer_names", "kv_cache_spec"]
    assert list(inspect.signature(StructuredOutputManager).parameters) == ["vllm_config"]


def test_blocks_are_hashed_with_the_functions_we_call():
    assert list(inspect.signature(get_request_block_hasher).parameters)[:2] == ["hash_block_size", "caching_hash_fn"]
    assert len(inspect.signature(init_none_hash).parameters) == 1
    assert callable(get_hash_fn_by_name("sha256"))


@pytest.mark.parametrize("scheduler_cls", [Scheduler, AsyncScheduler, HeadraceScheduler, VllmV0Scheduler])
def test_every_scheduler_is_made_with_the_limits_asked_for(scheduler_cls):
    scheduler = scheduler_of(scheduler_cls, blocks=33)
    assert type(scheduler) is scheduler_cls
    assert (scheduler.max_num_running_reqs, scheduler.max_num_scheduled_tokens) == (8, 256)
    assert (scheduler.block_size, scheduler.max_model_len) == (BLOCK, MAX_MODEL_LEN)
    assert scheduler.cache_config.num_gpu_blocks == 33
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 32, "vLLM keeps one block empty"
    assert not scheduler.cache_config.enable_prefix_caching
    assert (len(scheduler.running), len(scheduler.waiting), len(scheduler.skipped_waiting)) == (0, 0, 0)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_asynchronous_scheduling_is_what_was_asked_for_on_every_platform(asynchronous):
    scheduler = scheduler_of(AsyncScheduler, async_scheduling=asynchronous)
    assert scheduler.scheduler_config.async_scheduling is asynchronous


def test_chunked_prefill_is_what_was_asked_for():
    add(chunking := scheduler_of(max_num_batched_tokens=100), "long", prompt=150)
    assert chunking.schedule().num_scheduled_tokens == {"long": 100}
    whole = scheduler_of(max_num_batched_tokens=MAX_MODEL_LEN, enable_chunked_prefill=False)
    add(whole, "first", prompt=600)
    add(whole, "second", prompt=600)
    assert whole.schedule().num_scheduled_tokens == {"first": 600}, "no piece of the second"


def test_watermark_is_kept_free_of_new_requests():
    scheduler = scheduler_of(blocks=41, watermark=0.25)
    for name in "abcdef":
        add(scheduler, name, prompt=6 * BLOCK, output=12)
        iterate(scheduler)
    # 40 blocks of which 10 stay free: four prompts of six blocks, with one more each for what they generate.
    assert [request.request_id for request in scheduler.running] == list("abcd")


def test_vllm_rejects_impossible_settings_with_a_value_error():
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        scheduler_of(max_num_seqs=300, max_num_batched_tokens=256)


# Making a request.


@pytest.mark.parametrize("scheduler_cls", [Scheduler, AsyncScheduler, HeadraceScheduler])
@pytest.mark.parametrize("output", [1, 5])
def test_a_request_ends_after_its_output_tokens(scheduler_cls, output):
    scheduler = scheduler_of(scheduler_cls)
    request = add(scheduler, "r", output=output)
    for _ in range(output - 1):
        iterate(scheduler)
        assert not request.is_finished()
    iterate(scheduler)
    assert request.is_finished()
    assert (request.num_prompt_tokens, request.num_output_tokens) == (32, output)
    assert not scheduler.requests
    assert not scheduler.running


@pytest.mark.parametrize(("declared", "known"), [(None, None), ({EXPECTED_OUTPUT_TOKENS: 7}, 7)])
def test_a_scheduler_knows_of_the_length_only_what_was_declared(declared, known):
    scheduler = scheduler_of(HeadraceScheduler)
    request = add(scheduler, "r", output=3, declared=declared)
    assert request.sampling_params.max_tokens == MAX_MODEL_LEN
    assert scheduler.known_output_tokens(request) == known


def test_requests_and_outputs_have_what_we_read():
    request = make_request("r", [7] * 3, 2, arrival_s=1.5, max_model_len=MAX_MODEL_LEN)
    assert isinstance(request, Request)
    assert (request.status, request.arrival_time) == (RequestStatus.WAITING, 1.5)
    assert (request.num_computed_tokens, request.num_preemptions, request.is_prefill_chunk) == (0, 0, False)
    read = {"num_scheduled_tokens", "total_num_scheduled_tokens", "scheduled_new_reqs", "preempted_req_ids"}
    assert read <= {field.name for field in fields(SchedulerOutput)}
    assert "req_id" in {field.name for field in fields(NewRequestData)}
    made = {"req_ids", "req_id_to_index", "sampled_token_ids"}
    assert made <= {field.name for field in fields(ModelRunnerOutput)}


# Stepping it.


def test_an_iteration_tells_who_is_new_and_how_much_it_computes():
    scheduler = scheduler_of()
    add(scheduler, "old", prompt=20)
    output = iterate(scheduler)
    assert [new.req_id for new in output.scheduled_new_reqs] == ["old"]
    add(scheduler, "new", prompt=30)
    output = iterate(scheduler)
    assert [new.req_id for new in output.scheduled_new_reqs] == ["new"]
    assert output.num_scheduled_tokens == {"old": 1, "new": 30}
    assert output.total_num_scheduled_tokens == 31
    assert not output.preempted_req_ids
    assert scheduler_of().schedule().total_num_scheduled_tokens == 0


def test_every_piece_of_a_prompt_but_the_last_produces_nothing():
    scheduler = scheduler_of(max_num_batched_tokens=100)
    request = add(scheduler, "r", prompt=250)
    seen = []
    for _ in range(3):
        scheduled = scheduler.schedule()
        in_the_middle = request.is_prefill_chunk
        scheduler.update_from_output(scheduled, iteration_results(scheduled, ["r"] if in_the_middle else []))
        seen.append((scheduled.num_scheduled_tokens["r"], in_the_middle, request.num_output_tokens))
    assert seen == [(100, True, 0), (100, True, 0), (50, False, 1)]


def test_results_give_one_token_to_everyone_but_the_silent():
    scheduler = scheduler_of()
    requests = {name: add(scheduler, name) for name in ("a", "b", "c")}
    iterate(scheduler, silent=["b"])
    assert {name: request.num_output_tokens for name, request in requests.items()} == {"a": 1, "b": 0, "c": 1}


def test_usage_is_the_share_of_the_blocks_taken():
    scheduler = scheduler_of(blocks=9)
    assert scheduler.kv_cache_manager.usage == 0
    add(scheduler, "r", prompt=6 * BLOCK, output=40)
    scheduler.schedule()
    assert scheduler.kv_cache_manager.usage == 6 / 8
    scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    assert scheduler.kv_cache_manager.usage == 0


@pytest.mark.parametrize("scheduler_cls", [Scheduler, AsyncScheduler, HeadraceScheduler])
def test_a_preemption_is_told_while_the_request_still_knows_what_it_loses(scheduler_cls):
    scheduler = scheduler_of(scheduler_cls, blocks=9)
    watching = Watching(scheduler)
    add(scheduler, "first", prompt=3 * BLOCK, output=60)
    add(scheduler, "second", prompt=3 * BLOCK, output=60)
    second = scheduler.requests["second"]
    computed = 0
    while not watching.lost:
        computed = second.num_computed_tokens
        output = iterate(scheduler)
    assert watching.lost == [("second", computed, 0)]
    assert computed == 4 * BLOCK, "the block that both of them need next is not there"
    assert output.preempted_req_ids == {"second"}
    assert (second.status, second.num_computed_tokens, second.num_preemptions) == (RequestStatus.PREEMPTED, 0, 1)
    while scheduler.requests:
        iterate(scheduler)
    assert len(watching.lost) == 1
    assert watching.gone == [(name, 60, "FINISHED_LENGTH_CAPPED") for name in ("first", "second")]


@pytest.mark.parametrize("scheduler_cls", [Scheduler, AsyncScheduler, HeadraceScheduler])
def test_everyone_who_leaves_is_told_once(scheduler_cls):
    scheduler = scheduler_of(scheduler_cls, max_num_seqs=2)
    watching = Watching(scheduler)
    for name in ("running", "done", "waiting"):
        add(scheduler, name, output=2 if name == "done" else 50)
    iterate(scheduler)
    assert watching.gone == []
    iterate(scheduler)
    assert watching.gone == [("done", 2, "FINISHED_LENGTH_CAPPED")]
    add(scheduler, "late")
    for name in ("late", "running", "running", "unknown"):
        scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
    assert watching.gone[1:] == [("late", 0, "FINISHED_ABORTED"), ("running", 2, "FINISHED_ABORTED")]
    iterate(scheduler)
    assert [request.request_id for request in scheduler.running] == ["waiting"]


# The prefix cache.


@pytest.mark.parametrize("scheduler_cls", [Scheduler, AsyncScheduler, HeadraceScheduler, VllmV0Scheduler])
def test_without_prefix_caching_no_block_is_hashed(scheduler_cls):
    scheduler = scheduler_of(scheduler_cls)
    assert block_hasher_of(scheduler) is None
    assert add(scheduler, "r", prompt=64).block_hashes == []


@pytest.mark.parametrize("scheduler_cls", [Scheduler, AsyncScheduler, HeadraceScheduler])
def test_blocks_of_equal_tokens_are_computed_once_and_their_number_is_told(scheduler_cls):
    scheduler = scheduler_of(scheduler_cls, enable_prefix_caching=True)
    add(scheduler, "first", prompt=[1] * 40 + [2] * 40, output=20)
    iterate(scheduler)
    add(scheduler, "second", prompt=[1] * 40 + [3] * 40, output=20)
    output = iterate(scheduler)
    assert output.num_scheduled_tokens["second"] == 80 - 2 * BLOCK, "the third block differs"
    assert {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs} == {"second": 2 * BLOCK}


def test_answers_enter_the_cache_with_the_tokens_they_were_given():
    scheduler = scheduler_of(AsyncScheduler, enable_prefix_caching=True)
    add(scheduler, "turn", prompt=[1] * 40, output=30)
    while scheduler.requests:
        output = scheduler.schedule()
        scheduler.update_from_output(output, iteration_results(output, [], {"turn": [9]}))
    add(scheduler, "next", prompt=[1] * 40 + [9] * 30 + [4] * 10)
    assert scheduler.schedule().num_scheduled_tokens == {"next": 80 - 4 * BLOCK}
    add(scheduler, "other", prompt=[1] * 40 + [8] * 30 + [4] * 10)
    assert scheduler.schedule().num_scheduled_tokens["other"] == 80 - 2 * BLOCK


# Speculative decoding.


@pytest.mark.parametrize(("asynchronous", "method"), [(False, "ngram"), (True, "ngram_gpu")])
def test_a_scheduler_with_drafts_verifies_as_many_as_it_is_handed(asynchronous, method):
    speculation = {"method": method, "num_speculative_tokens": 3}
    scheduler = scheduler_of(AsyncScheduler, speculative_config=speculation, async_scheduling=asynchronous)
    request = add(scheduler, "r", output=20)
    gained = []
    while not request.is_finished():
        output = scheduler.schedule()
        drafted = drafted_requests(output)
        gained.append(1 if not drafted else 2)
        before = request.num_output_tokens
        scheduler.update_from_output(output, iteration_results(output, [], {"r": [5]}, dict.fromkeys(drafted, 2)))
        hand_drafts(scheduler, output, 3)
        assert request.num_output_tokens == min(before + gained[-1], 20)
        assert output.num_scheduled_tokens == {"r": 32 if before == 0 else 4}
    assert gained == [1, *[2] * 10]


def test_a_drafter_s_tokens_reach_the_scheduler_as_the_engine_core_hands_them_on():
    assert {"req_ids", "draft_token_ids"} <= {field.name for field in fields(DraftTokenIds)}
    source = inspect.getsource(EngineCore.post_step)
    assert "not self.async_scheduling" in source and "self.scheduler.update_draft_token_ids(draft_token_ids)" in source
    assert "resumed_req_ids" in {field.name for field in fields(CachedRequestData)}
