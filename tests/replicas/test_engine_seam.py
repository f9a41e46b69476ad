"""Rejections and early errors on their way through Ray's engine and vLLM's OpenAI layer, both not public."""

from __future__ import annotations

import asyncio
import inspect
import json
import signal
import subprocess
import sys
from copy import copy
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse
from ray.llm._internal.serve.engines.vllm import vllm_engine
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.openai.chat_completion import serving as chat_serving
from vllm.entrypoints.openai.completion import serving as completion_serving
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GenerationError, GracefulHTTPError, VLLMClientError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources, DPLBAsyncMPClient, MPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState
from vllm.v1.engine.parallel_sampling import ParentRequest

from replicas.engine import HeadraceEngine, errors_first, recalled
from replicas.engine_client import EngineClient, kill_children
from replicas.engine_health import REPLICA_FAILED, EngineHealth
from replicas.failed_answers import ERROR_EVENT, failing_clearly
from scheduler.rejection import Kind, Rejection
from scheduler.request_rejected import RequestRejected, raising_rejections

REJECTION = Rejection("busy", 3)
RECALL = Rejection("stopping", 4, Kind.RECALLED)
CUT = Rejection("stopped", 5, Kind.ENDED)


def choice(stop_reason: object = None, finish_reason: str | None = None) -> Any:
    return SimpleNamespace(stop_reason=stop_reason, finish_reason=finish_reason)


def output(*choices: Any) -> Any:
    return SimpleNamespace(outputs=list(choices))


REJECTED = choice(REJECTION.as_json(), "abort")
SERVED = choice(None, "length")


class Given:
    """An asynchronous generator that tells whether it has been closed."""

    def __init__(self, *items: Any) -> None:
        self.closed = False
        self.items = self._given(items)

    async def _given(self, items: tuple[Any, ...]) -> Any:
        try:
            for item in items:
                yield item
        finally:
            self.closed = True


def given(*items: Any) -> Any:
    return Given(*items).items


async def collected(generator: Any) -> list[Any]:
    return [item async for item in generator]


def test_a_rejection_is_each_kind_of_error_that_a_path_looks_for() -> None:
    for kind in (GenerationError, GracefulHTTPError, VLLMClientError):
        assert issubclass(RequestRejected, kind)
    assert {"message", "type", "code"} <= set(ErrorInfo.model_fields) and "error" in ErrorResponse.model_fields


def test_a_rejection_becomes_an_error_with_status_429_that_gives_it_back() -> None:
    error = create_error_response(RequestRejected(REJECTION)).error
    assert error.code == HTTPStatus.TOO_MANY_REQUESTS
    assert Rejection.from_json(error.message) == REJECTION


def test_a_stream_s_rejection_comes_out_of_vllms_own_event_as_it_went_in() -> None:
    serving = GenerateBaseServing.__new__(GenerateBaseServing)
    data = serving._convert_generation_error_to_streaming_response(RequestRejected(REJECTION))
    (error,) = asyncio.run(collected(errors_first(given(f"data: {data}\n\n", "data: [DONE]\n\n"))))
    assert error.error.code == HTTPStatus.TOO_MANY_REQUESTS
    assert Rejection.from_json(error.error.message) == REJECTION


def test_an_aborted_answer_says_so_where_this_looks() -> None:
    assert str(FinishReason.ABORT) == "abort"
    assert "finish_reason=str(finish_reason) if finished else None" in inspect.getsource(
        RequestState._new_completion_output
    )


@pytest.mark.parametrize(
    "outputs", [[output(REJECTED)], [output(REJECTED, REJECTED)]], ids=["one choice", "two choices"]
)
def test_generate_raises_what_the_engine_core_rejected_and_ends_the_rest(outputs: list[Any]) -> None:
    inner = Given(*outputs, output(SERVED))

    async def main() -> None:
        with pytest.raises(RequestRejected) as error:
            await collected(raising_rejections(lambda: inner.items)())
        assert Rejection.from_json(str(error.value)) == REJECTION
        assert inner.closed, "what else the request has in the engine stops at once"

    asyncio.run(main())


@pytest.mark.parametrize("choices", [(SERVED, REJECTED), (REJECTED, SERVED)], ids=["served first", "rejected first"])
def test_a_finished_choice_is_never_thrown_away(choices: tuple[Any, ...]) -> None:
    outputs = [output(*choices)]
    assert asyncio.run(collected(raising_rejections(lambda: given(*outputs))())) == outputs


def collector_of_two_choices(kind: RequestOutputKind, *answers: EngineCoreOutput) -> RequestOutputCollector:
    """vLLM's own way from the engine core's answers to what `generate` yields."""
    processor = OutputProcessor(None, log_stats=False)
    request = EngineCoreRequest(
        request_id="p-ab", prompt_token_ids=[1], mm_features=None, pooling_params=None, arrival_time=0.0,
        sampling_params=SamplingParams(n=2, output_kind=kind, detokenize=False), lora_request=None, cache_salt=None,
        data_parallel_rank=None, external_req_id="p",
    )
    parent, collector = ParentRequest(request), RequestOutputCollector(kind, request.request_id)
    for index in range(2):
        child = copy(request)
        child.request_id, child.sampling_params = parent.get_child_info(index)
        processor.add_request(child, None, parent, index, collector)
    processor.process_outputs(list(answers))
    return collector


def rejected_choice(index: int) -> EngineCoreOutput:
    return EngineCoreOutput(
        f"{index}_p-ab", [], finish_reason=FinishReason.ABORT, stop_reason=REJECTION.as_json()
    )


@pytest.mark.parametrize("kind", list(RequestOutputKind), ids=str)
def test_vllm_hands_on_a_request_whose_choices_are_all_rejected_as_one(kind: RequestOutputKind) -> None:
    collector = collector_of_two_choices(kind, rejected_choice(0), rejected_choice(1))
    with pytest.raises(RequestRejected):
        asyncio.run(collected(raising_rejections(lambda: given(collector.get_nowait()))()))


@pytest.mark.parametrize("kind", list(RequestOutputKind), ids=str)
def test_vllm_hands_on_a_finished_choice_beside_a_rejected_one(kind: RequestOutputKind) -> None:
    served = EngineCoreOutput("1_p-ab", [5, 6], finish_reason=FinishReason.LENGTH)
    collector = collector_of_two_choices(kind, rejected_choice(0), served)
    (passed,) = asyncio.run(collected(raising_rejections(lambda: given(collector.get_nowait()))()))
    assert [list(one.token_ids) for one in passed.outputs] == [[], [5, 6]]


@pytest.mark.parametrize("finish_reason", ["stop", "length", None])
def test_a_client_s_own_stop_string_is_no_rejection(finish_reason: str | None) -> None:
    outputs = [output(choice(REJECTION.as_json(), finish_reason)), output(choice(REJECTION.text, finish_reason))]
    assert asyncio.run(collected(raising_rejections(lambda: given(*outputs))())) == outputs


def test_other_outputs_pass_and_nothing_is_cut_after_it_has_begun() -> None:
    outputs = [output(choice()), output(choice(128001, "stop")), output(choice("END", "stop")), output(REJECTED)]
    assert asyncio.run(collected(raising_rejections(lambda: given(*outputs))())) == outputs


def test_a_client_that_goes_away_ends_the_inner_generators() -> None:
    inner = Given(output(choice()), output(choice()))
    chunks = Given("data: 1\n\n", "data: 2\n\n")

    async def main() -> None:
        for generator in (raising_rejections(lambda: inner.items)(), errors_first(chunks.items)):
            await anext(generator)
            await generator.aclose()
        assert inner.closed and chunks.closed

    asyncio.run(main())


def test_a_stream_that_begins_with_an_error_is_that_error() -> None:
    event = 'data: {"error": {"message": "m", "type": "t", "param": null, "code": 429}}\n\n'
    (error,) = asyncio.run(collected(errors_first(given(event, "data: [DONE]\n\n"))))
    assert isinstance(error, ErrorResponse) and (error.error.code, error.error.message) == (429, "m")


def test_an_error_within_a_stream_stays_where_it_is() -> None:
    events = ['data: {"id": 1}\n\n', 'data: {"error": {"message": "m"}}\n\n']
    assert asyncio.run(collected(errors_first(given(*events)))) == events


def test_ray_starts_its_client_and_answers_errors_where_this_looks() -> None:
    assert "engine_client" in inspect.getsource(vllm_engine.VLLMEngine._start_async_llm_engine)
    for name in ("chat", "completions", "transcriptions"):
        assert "except (ValueError, VLLMClientError)" in inspect.getsource(getattr(vllm_engine.VLLMEngine, name))
    assert issubclass(HeadraceEngine, vllm_engine.VLLMEngine)
    assert inspect.isasyncgenfunction(AsyncLLM.generate)


@pytest.mark.parametrize("method", ["chat", "completions", "transcriptions"])
def test_every_path_that_generates_answers_a_rejected_stream_with_one_error(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's streams do: an event with the error, in which the rejection is a JSON text, and the end."""
    event = json.dumps({"error": create_error_response(RequestRejected(REJECTION)).error.model_dump()})
    monkeypatch.setattr(
        vllm_engine.VLLMEngine, method, lambda self, *args: given(f"data: {event}\n\n", "data: [DONE]\n\n")
    )
    (error,) = asyncio.run(collected(getattr(HeadraceEngine.__new__(HeadraceEngine), method)(None)))
    assert isinstance(error, ErrorResponse) and error.error.code == HTTPStatus.TOO_MANY_REQUESTS
    assert Rejection.from_json(error.error.message) == REJECTION


@pytest.mark.parametrize("serving", [chat_serving, completion_serving])
def test_vllms_streams_report_a_generation_error_first_and_without_a_traceback(serving: Any) -> None:
    source = inspect.getsource(serving)
    _, _, after = source.partition("except GenerationError as e:")
    assert after.lstrip().startswith('yield f"data: {self._convert_generation_error_to_streaming_response(e)}')
    assert "except Exception as e:" in after


# A replica that stops.


@pytest.mark.parametrize("streamed", [True, False])
def test_a_recalled_request_is_an_error_of_its_own_type_that_the_ingress_knows(streamed: bool) -> None:
    error = create_error_response(RequestRejected(RECALL)).error.model_dump()
    whole = ErrorResponse(error=ErrorInfo(**error))
    serving = GenerateBaseServing.__new__(GenerateBaseServing)
    event = f"data: {serving._convert_generation_error_to_streaming_response(RequestRejected(RECALL))}\n\n"
    (found,) = asyncio.run(collected(errors_first(given(*([event, "data: [DONE]\n\n"] if streamed else [whole])))))
    assert isinstance(found, ErrorResponse) and (found.error.type, found.error.code) == ("recalled", 503)
    assert Rejection.from_json(found.error.message) == RECALL
    assert recalled(RECALL) == found, "the replica itself answers late ones in the same way"


def test_a_rejection_keeps_the_status_and_type_it_had() -> None:
    error = create_error_response(RequestRejected(REJECTION)).error
    (found,) = asyncio.run(collected(errors_first(given(ErrorResponse(error=ErrorInfo(**error.model_dump()))))))
    assert (found.error.type, found.error.code) == (error.type, 429)


@pytest.mark.parametrize("others", [(), (SERVED,), (choice(),)], ids=["alone", "beside a finished one", "beside one"])
def test_an_answer_that_is_cut_raises_also_after_it_has_begun(others: tuple[Any, ...]) -> None:
    inner = Given(output(choice(), *others), output(choice(CUT.as_json(), "abort"), *others))

    async def main() -> None:
        passed = raising_rejections(lambda: inner.items)()
        await anext(passed)
        with pytest.raises(RequestRejected) as error:
            await anext(passed)
        assert Rejection.from_json(str(error.value)) == CUT and inner.closed

    asyncio.run(main())


def test_a_stream_that_is_cut_ends_with_an_error_in_words_and_nothing_after_it() -> None:
    serving = GenerateBaseServing.__new__(GenerateBaseServing)
    event = f"data: {serving._convert_generation_error_to_streaming_response(RequestRejected(CUT))}\n\n"
    first, last = asyncio.run(collected(errors_first(given('data: {"id": 1}\n\n', event, "data: [DONE]\n\n"))))
    assert first == 'data: {"id": 1}\n\n'
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["message"], error["type"], error["code"]) == ("ended: stopped; retry in 5 s", "ended", 503)


def test_the_engine_core_ends_with_its_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own shutdown leaves it to be killed, and its shared memory in place."""
    assert "_engine_client" not in inspect.getsource(vllm_engine.VLLMEngine.shutdown)
    assert list(inspect.signature(AsyncLLM.shutdown).parameters) == ["self", "timeout"]
    engine = HeadraceEngine.__new__(HeadraceEngine)
    engine._token_receiver = None
    ended: list[float] = []
    engine._engine_client = SimpleNamespace(shutdown=lambda timeout: ended.append(timeout))
    asyncio.run(engine.shutdown())
    assert len(ended) == 1 and ended[0] > 5
    engine._engine_client = None
    asyncio.run(engine.shutdown())


# replicas/engine_client.py, replicas/failed_answers.py


def test_vllms_client_says_that_an_engine_died_and_what_it_has() -> None:
    assert isinstance(inspect.getattr_static(AsyncLLM, "errored"), property)
    assert "self.output_processor = OutputProcessor(" in inspect.getsource(AsyncLLM.__init__)
    assert "output_processor.process_outputs(" in inspect.getsource(AsyncLLM._run_output_handler)
    processor = OutputProcessor(None, log_stats=False)
    cores = SimpleNamespace()
    client = EngineClient(SimpleNamespace(output_processor=processor, errored=False, engine_core=cores))
    assert (client.is_dead(), client.requests(0), client.outputs()) == (False, 0, 0)
    request = EngineCoreRequest(
        request_id="p", prompt_token_ids=[1], mm_features=None, pooling_params=None, arrival_time=0.0,
        sampling_params=SamplingParams(detokenize=False), lora_request=None, cache_salt=None,
        data_parallel_rank=None, external_req_id="p",
    )
    processor.add_request(request, None, None, 0, RequestOutputCollector(RequestOutputKind.DELTA, "p"))
    assert client.requests(0) == 1
    cores.core_engines, cores.reqs_in_flight = [b"\0\0", b"\1\0"], {"p": b"\1\0", "gone": b"\0\0"}
    assert (client.requests(0), client.requests(1)) == (0, 1), "of each rank by itself"
    processor.process_outputs([EngineCoreOutput("p", [5], finish_reason=FinishReason.LENGTH)])
    assert (client.requests(1), client.outputs()) == (0, 1)
    balancing = inspect.getsource(DPLBAsyncMPClient)
    assert "self.reqs_in_flight[request.request_id] = chosen_engine" in balancing
    assert "chosen_engine = self.core_engines[eng_index]" in balancing
    assert not hasattr(AsyncMPClient, "reqs_in_flight") and "reqs_in_flight" not in inspect.getsource(AsyncMPClient)
    # A question that goes through the engine core's own loop.
    assert "self.engine_core.is_sleeping_async()" in inspect.getsource(AsyncLLM.is_sleeping)
    assert "call_utility_async" in inspect.getsource(AsyncMPClient.is_sleeping_async)


def test_vllm_fails_the_requests_under_way_when_an_engine_core_ends() -> None:
    monitor = inspect.getsource(MPClient.start_engine_core_monitor)
    assert "engine_dead = True" in monitor and "_self.shutdown()" in monitor
    assert "task.cancel()" in inspect.getsource(BackgroundResources.__call__)
    assert "outputs_queue.put_nowait(EngineDeadError())" in inspect.getsource(AsyncMPClient._ensure_output_queue_task)
    assert "output_processor.propagate_error(e)" in inspect.getsource(AsyncLLM._run_output_handler)
    assert "EngineClient(self._engine_client)" in inspect.getsource(HeadraceEngine.be_watched)
    assert "self._engine_client = " in inspect.getsource(vllm_engine.VLLMEngine)


def test_stopped_processes_are_ended_too_and_the_tracker_of_shared_memory_is_left() -> None:
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    stopped, tracker = subprocess.Popen(sleeping), subprocess.Popen([*sleeping, "resource_tracker"])
    try:
        stopped.send_signal(signal.SIGSTOP)
        kill_children()
        assert stopped.wait(10) == -signal.SIGKILL
        assert tracker.poll() is None
    finally:
        tracker.kill()
        tracker.wait()


class Engine:
    """Stands for the engines under a replica."""

    def __init__(self) -> None:
        self.dead = False

    def is_dead(self) -> bool:
        return self.dead

    def requests(self) -> int:
        return 0

    def outputs(self) -> int:
        return 0

    def kill(self) -> None: ...


def answered(*items: Any, dies_before: int | None = None, failed_already: bool = False) -> list[Any]:
    """What the client of a replica gets of `items`, when its engine dies before one of them is there."""

    async def main() -> list[Any]:
        engine = Engine()

        async def never(rank: int) -> Any:
            await asyncio.Event().wait()

        async def chunks() -> Any:
            for number, item in enumerate(items):
                engine.dead |= number == dies_before
                if isinstance(item, Exception):
                    raise item
                yield item

        health = EngineHealth(never, 1, lambda: None)
        health.watch(engine)
        engine.dead = failed_already
        return await collected(failing_clearly(chunks(), health))

    return asyncio.run(main())


DEAD = EngineDeadError()
EVENT = f'{ERROR_EVENT} {{"message": "EngineCore", "type": "InternalServerError", "code": 500}}}}\n\n'
TEXT = 'data: {"id": 1}\n\n'
END = "data: [DONE]\n\n"


def test_vllms_error_event_begins_as_ours_does() -> None:
    data = GenerateBaseServing.__new__(GenerateBaseServing)._convert_generation_error_to_streaming_response(
        RequestRejected(REJECTION)
    )
    assert f"data: {data}".startswith(ERROR_EVENT)


@pytest.mark.parametrize("item", [DEAD, create_error_response(DEAD)], ids=["raised", "answered"])
def test_a_request_that_a_dead_engine_has_not_begun_is_marked(item: Any) -> None:
    item = item if isinstance(item, Exception) else ErrorResponse(error=ErrorInfo(**item.error.model_dump()))
    (error,) = answered(item, dies_before=0)
    assert (error.error.type, error.error.code) == (REPLICA_FAILED, 503)


def test_a_new_request_at_a_failed_replica_is_refused() -> None:
    (error,) = answered(TEXT, END, failed_already=True)
    assert (error.error.type, error.error.code) == (REPLICA_FAILED, 503)


@pytest.mark.parametrize("item", [DEAD, EVENT], ids=["raised", "event"])
def test_a_stream_that_loses_its_engine_ends_with_a_marked_event(item: Any) -> None:
    first, last = answered(TEXT, item, END, dies_before=1)
    assert first == TEXT and last.startswith(ERROR_EVENT) and last.endswith("\n\n")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == (REPLICA_FAILED, 503)


def test_errors_of_a_healthy_engine_pass_and_end_a_stream() -> None:
    assert answered(TEXT, EVENT, END) == [TEXT, EVENT]
    assert answered(TEXT, END) == [TEXT, END]
    with pytest.raises(KeyError):
        answered(KeyError("x"))
