"""The fence around vLLM's non-public scheduler surface: an upgrade that moves any of it fails here, by name."""

import inspect
from dataclasses import fields

import pytest
import vllm
from engine_harness import Engine
from vllm.config import CacheConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.completion import serving as completion_serving
from vllm.entrypoints.speech_to_text.base import serving as speech_serving
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_kv_cache_capacity
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.request import Request, RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from scheduler.engine.admission_queue import AdmissionQueue
from scheduler.engine.choices import family_of, parent_of
from scheduler.engine.start_estimate import start_estimate
from scheduler.model.estimate import GPU_MEMORY_UTILIZATION
from scheduler.support import EngineSetup
from scheduler.tuning.slo import NO_SLO
from scheduler.vllm_scheduler import HeadraceScheduler


def test_vllm_is_the_pinned_version():
    assert vllm.__version__.split("+")[0].startswith("0.29."), vllm.__version__


def test_loggers_below_vllm_s_have_its_handlers():
    assert init_logger("vllm.headrace").parent.name == "vllm"


def test_headrace_scheduler_is_an_asynchronous_scheduler():
    assert issubclass(HeadraceScheduler, AsyncScheduler) and issubclass(AsyncScheduler, Scheduler)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("schedule", ["self", "throttle_prefills"]),
        ("update_from_output", ["self", "scheduler_output", "model_runner_output"]),
        ("add_request", ["self", "request"]),
        ("_enqueue_waiting_request", ["self", "request"]),
        ("_free_request", ["self", "request", "delay_free_blocks"]),
        ("shutdown", ["self"]),
        ("_update_after_schedule", ["self", "scheduler_output"]),
    ],
)
def test_overridden_methods_exist_with_our_parameters(method, parameters):
    for owner in (Scheduler, HeadraceScheduler):
        assert list(inspect.signature(getattr(owner, method)).parameters) == parameters, owner
    theirs, ours = (inspect.signature(getattr(owner, method)).parameters for owner in (Scheduler, HeadraceScheduler))
    assert [p.default for p in theirs.values()] == [p.default for p in ours.values()]


def test_nothing_but_the_known_methods_is_overridden():
    inherited = {name for owner in (Scheduler, AsyncScheduler) for name in vars(owner)}
    methods = {name for name, member in vars(HeadraceScheduler).items() if inspect.isfunction(member)}
    assert (methods & inherited) - {"__init__"} == {
        "schedule", "update_from_output", "add_request", "_enqueue_waiting_request", "_free_request", "shutdown",
        "_update_after_schedule", "_update_request_with_output",
    }


@pytest.mark.parametrize(
    ("method", "reads"),
    [
        ("schedule", "token_budget = self.max_num_scheduled_tokens"),
        ("schedule", "num_running = len(self.running)"),
        ("schedule", ">= self.max_num_running_reqs"),
        ("schedule", "while (self.waiting or self.skipped_waiting) and token_budget > 0:"),
        ("schedule", "self.running.append(request)"),
        ("schedule", "preempted_req = self.running.pop()"),
        ("schedule", "if 0 < self.scheduler_config.long_prefill_token_threshold < num_new_tokens:"),
        ("schedule", "threshold = self.scheduler_config.long_prefill_token_threshold"),
        ("schedule", "new_blocks = self.kv_cache_manager.allocate_slots("),
        ("schedule", "preempted_req_ids=self.reset_preempted_req_ids"),
        ("_preempt_request", "request.status == RequestStatus.RUNNING"),
        ("_preempt_request", "self.reset_preempted_req_ids.add(request.request_id)"),
        ("update_from_output", "self.waiting.remove_requests(stopped_preempted_reqs)"),
        ("_select_waiting_queue_for_scheduling", "self.skipped_waiting or self.waiting"),
        ("_preempt_request", "self.waiting.prepend_request(request)"),
        ("finish_requests", "self.waiting.remove_requests("),
        ("finish_requests", "self._free_request(request, delay_free_blocks="),
        ("add_request", "self._enqueue_waiting_request(request)"),
        ("_enqueue_waiting_request", "self.skipped_waiting.add_request(request)"),
        ("get_num_unfinished_requests", "len(self.waiting)"),
        ("get_request_counts", "len(self.waiting)"),
        ("make_stats", "len(self.waiting)"),
        ("update_from_output", "self.running = remove_all(self.running"),
        ("update_from_output", "outputs[request.client_index].append("),
    ],
)
def test_every_attribute_we_set_or_replace_is_still_used(method, reads):
    assert reads in inspect.getsource(getattr(Scheduler, method))


def test_held_requests_are_preempted_as_vllm_does_it():
    """`scheduler.engine.held` puts itself in the place of `allocate_slots` and calls `_preempt_request`."""
    assert list(inspect.signature(Scheduler._preempt_request).parameters) == [
        "self", "request", "timestamp", "drop_stale_output",
    ]
    assert list(inspect.signature(KVCacheManager.allocate_slots).parameters)[:2] == ["self", "request"]
    assert "return None" in inspect.getsource(KVCacheManager.allocate_slots)
    assert Engine(AsyncScheduler).scheduler.requires_kv_delivery is False


def test_the_batches_of_a_pipeline_take_turns_as_we_count_them():
    """What `scheduler.engine.pipeline` reads."""
    assert "if self.current_step < request.next_decode_eligible_step:" in inspect.getsource(Scheduler.schedule)
    statement = "request.next_decode_eligible_step = self.current_step + self.pp_size"
    assert statement in inspect.getsource(AsyncScheduler)
    assert isinstance(VllmConfig.use_v2_model_runner, property)
    assert "self.parallel_config.pipeline_parallel_size" in inspect.getsource(VllmConfig.max_concurrent_batches.fget)


def test_the_waiting_queue_is_replaced():
    assert "self.waiting = create_request_queue(self.policy)" in inspect.getsource(Scheduler.__init__)
    others = [
        name for name, member in vars(Scheduler).items()
        if inspect.isfunction(member) and name != "__init__" and "self.waiting = " in inspect.getsource(member)
    ]
    assert not others, "vLLM would put its own queue back"


def test_admission_queue_implements_exactly_the_abstract_methods():
    abstract = {
        "add_request", "pop_request", "peek_request", "prepend_request", "prepend_requests", "remove_request",
        "remove_requests", "__bool__", "__len__", "__iter__",
    }
    assert abstract == RequestQueue.__abstractmethods__
    assert abstract <= set(vars(AdmissionQueue)) and not AdmissionQueue.__abstractmethods__
    for name in abstract:
        theirs, ours = (inspect.signature(getattr(owner, name)).parameters for owner in (RequestQueue, AdmissionQueue))
        assert list(theirs) == list(ours), name
    assert {policy.value for policy in SchedulingPolicy} == {"fcfs", "priority"}
    assert isinstance(create_request_queue(SchedulingPolicy.PRIORITY), RequestQueue)


def test_request_attributes_we_read():
    engine = Engine()
    request = engine.add("r")
    for attribute in (
        "request_id", "status", "num_prompt_tokens", "num_output_tokens", "num_output_placeholders",
        "is_prefill_chunk", "num_computed_tokens", "num_preemptions", "max_tokens", "sampling_params", "priority",
        "arrival_time", "num_tokens", "client_index", "pooling_params", "is_finished",
    ):
        assert hasattr(request, attribute), attribute
    assert hasattr(request.sampling_params, "extra_args")
    engine.steps(4)
    assert request.num_tokens == request.num_prompt_tokens + request.num_output_tokens > request.num_prompt_tokens
    assert request.client_index == 0, "one API server"


def test_prompts_in_progress_are_where_we_count_them():
    engine = Engine(AsyncScheduler)
    request = engine.add("long", prompt=600)
    assert engine.scheduler._inflight_prefills == set()
    engine.step()
    assert engine.scheduler._inflight_prefills == {request} and request.num_computed_tokens == 512
    engine.steps(2)
    assert engine.scheduler._inflight_prefills == set()


def test_an_answer_of_ours_is_made_as_vllm_makes_its_own():
    answer = EngineCoreOutput("r", [], finish_reason=FinishReason.ABORT, stop_reason="why")
    assert (answer.request_id, answer.new_token_ids, answer.finished) == ("r", [], True)
    assert answer.stop_reason == "why" and str(answer.finish_reason) == "abort"
    outputs = EngineCoreOutputs(outputs=[])
    outputs.outputs.append(answer)
    sent = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(outputs))
    assert [one.stop_reason for one in sent.outputs] == ["why"]
    source = inspect.getsource(Scheduler.update_from_output)
    assert "client_index: EngineCoreOutputs(outputs=outs)" in source, "a dict by client"


def test_request_statuses_we_name():
    names = {status.name for status in RequestStatus}
    assert {
        "WAITING", "RUNNING", "PREEMPTED", "FINISHED_ABORTED", "FINISHED_ERROR", "WAITING_FOR_STREAMING_REQ",
        "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR",
    } <= names


def test_scheduler_output_fields_we_read():
    names = {field.name for field in fields(SchedulerOutput)}
    assert {
        "num_scheduled_tokens", "total_num_scheduled_tokens", "scheduled_spec_decode_tokens", "preempted_req_ids",
    } <= names


def test_scheduler_attributes_we_read_or_set():
    scheduler = Engine(AsyncScheduler).scheduler
    for attribute in (
        "vllm_config", "scheduler_config", "cache_config", "policy", "requests", "running", "waiting",
        "skipped_waiting", "block_size", "max_model_len", "max_num_running_reqs", "max_num_scheduled_tokens",
        "num_spec_tokens",
    ):
        assert hasattr(scheduler, attribute), attribute
    assert isinstance(scheduler.running, list) and isinstance(scheduler.requests, dict)
    assert isinstance(scheduler.waiting, RequestQueue) and isinstance(scheduler.skipped_waiting, RequestQueue)
    assert isinstance(scheduler.kv_cache_manager.usage, float)
    assert isinstance(scheduler.scheduler_config.enable_chunked_prefill, bool)
    assert scheduler.cache_config.num_gpu_blocks == 256
    assert scheduler.vllm_config.additional_config == {"headrace": {"controller": None}}


def test_the_engine_setup_is_read_from_vllm_s_config():
    config = Engine(AsyncScheduler).scheduler.vllm_config
    assert EngineSetup.from_vllm_config(config, NO_SLO) == EngineSetup()
    assert next(iter(inspect.signature(Scheduler.__init__).parameters.items()))[0] == "self"
    assert list(inspect.signature(Scheduler.__init__).parameters)[1] == "vllm_config"
    independent = inspect.getsource(type(config.parallel_config).reconfigure_for_independent_dp_rank)
    assert "data_parallel_size = 1" in independent and "data_parallel_index" not in independent.split('"""')[-1]


def test_a_choice_s_id_tells_its_request():
    request = EngineCoreRequest(
        request_id="cmpl-7-0-a1b2c3d4", prompt_token_ids=[1], mm_features=None, sampling_params=SamplingParams(n=12),
        pooling_params=None, arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None,
        external_req_id="cmpl-7-0",
    )
    parent = ParentRequest(request)
    for index in range(parent.n):
        name, params = parent.get_child_info(index)
        assert parent_of(name) == request.request_id and params.n == 1
    assert "parent_request.get_child_info(idx)" in inspect.getsource(AsyncLLM.add_request)


@pytest.mark.parametrize("choices", [1, 3])
def test_a_prompt_s_id_tells_its_completion(choices):
    source = inspect.getsource(completion_serving)
    assert 'request_id = f"cmpl-{' in source and 'request_id_item = f"{request_id}-{i}"' in source
    speech = inspect.getsource(speech_serving)
    assert 'f"{self.task_type}-{self._base_request_id(raw_request)}"' in speech and 'f"{request_id}-{idx}"' in speech
    families = set()
    for place in range(12):
        request = EngineCoreRequest(
            request_id=f"cmpl-7-{place}", prompt_token_ids=[1], mm_features=None,
            sampling_params=SamplingParams(n=choices), pooling_params=None, arrival_time=0.0, lora_request=None,
            cache_salt=None, data_parallel_rank=None,
        )
        InputProcessor.assign_request_id(request)
        parent = ParentRequest(request)
        names = [parent.get_child_info(index)[0] for index in range(choices)] if choices > 1 else [request.request_id]
        families |= {family_of(name) for name in names}
    assert families == {"cmpl-7"}


def test_the_block_manager_tells_what_the_prefix_cache_holds():
    """`scheduler.engine.prefix_hits` asks it for a waiting request's cached blocks and how many requests hold each."""
    assert list(inspect.signature(KVCacheManager.get_computed_blocks).parameters) == ["self", "request"]
    assert "ref_cnt" in {field.name for field in fields(KVCacheBlock)}
    asked = list(inspect.signature(BlockPool.get_cached_block).parameters)
    assert asked == ["self", "block_hash", "kv_cache_group_ids"]
    manager = Engine().scheduler.kv_cache_manager
    assert isinstance(manager.block_pool, BlockPool) and len(manager.kv_cache_config.kv_cache_groups) == 1
    assert "block_hashes" in inspect.getsource(Request.__init__)
    assert "num_waiting_for_streaming_input" in inspect.getsource(Scheduler.__init__)


def test_the_platform_names_its_device_and_the_configuration_the_model():
    """`scheduler.engine.start_estimate` reads both; `headrace profile measure` asks the platform too."""
    assert current_platform.is_cpu() in (True, False) and callable(current_platform.get_device_name)
    config = Engine().scheduler.vllm_config
    assert start_estimate(config, "NVIDIA H100 80GB HBM3").time_model is not None
    defaults = inspect.getsource(EngineArgs.get_batch_defaults)
    assert "70 * GiB_bytes" in defaults and "160 * GiB_bytes" in defaults and "8192" in defaults
    assert CacheConfig.__dataclass_fields__["gpu_memory_utilization"].default.default == GPU_MEMORY_UTILIZATION


def test_the_kv_capacity_of_layers_of_several_kinds_is_by_context_and_batch():
    """`kv_capacity_tokens` asks it for a usual request, by another context and no prompt under way."""
    assert list(inspect.signature(get_kv_cache_capacity).parameters) == ["vllm_config", "kv_cache_config"]
    assert "vllm_config.model_config.max_model_len" in inspect.getsource(get_kv_cache_capacity)
    assert "vllm_config.max_in_flight_tokens" in inspect.getsource(SlidingWindowSpec.max_memory_usage_bytes)
    assert "max_num_batched_tokens" in inspect.getsource(VllmConfig.max_in_flight_tokens.fget)
