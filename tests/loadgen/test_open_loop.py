"""What is sent when, and what becomes of each answer, against a server on a socket."""

import asyncio
import threading

import httpx
import pytest
from aiohttp import web
from fake_server import DONE, FakeServer, answer_all, event

from loadgen.client import Server, ServerError
from loadgen.open_loop import OpenLoop
from simulator.workload.config import WorkloadConfig
from simulator.workload.requests import SimRequest, open_workload

PATIENT_S = 20.0


def measure(server, requests, *, timeout_s=PATIENT_S, stop_when=None, **options):
    """The exchanges of an open loop, and whether it was whole; `stop_when` cancels it as Ctrl-C does."""

    async def run():
        async with Server(server.url, api_key="secret") as client:
            loop = OpenLoop(client, "tiny", timeout_s=timeout_s, **options)
            task = asyncio.create_task(loop.run(requests))
            if stop_when:
                await asyncio.wait_for(asyncio.to_thread(stop_when.wait), PATIENT_S)
                task.cancel()
            return loop.exchanges, await task

    return asyncio.run(run())


def at_once(n, output_tokens=3, prompt_tokens=5):
    return [SimRequest(0.0, prompt_tokens, output_tokens, "all")] * n


def one(answer, **options):
    """The exchange of a single request."""
    with FakeServer(answer) as server:
        (exchange,), whole = measure(server, at_once(1), **options)
    assert whole
    return exchange


@pytest.mark.slow
def test_nobody_waits_for_an_answer():
    n = 130  # more than an HTTP client keeps connections by default
    everybody_is_here = asyncio.Event()

    async def when_all_have_arrived(call):
        if call.number == n:
            everybody_is_here.set()
        await everybody_is_here.wait()
        return await answer_all(call)

    config = WorkloadConfig(lengths="p4d2", rate_rps=400.0, requests=n)
    wanted = list(open_workload(config).requests())
    with FakeServer(when_all_have_arrived) as server:
        exchanges, whole = measure(server, wanted)
    assert whole
    assert [exchange.outcome for exchange in exchanges] == ["completed"] * n
    assert [exchange.asked for exchange in exchanges] == wanted
    assert all(exchange.sent_s >= exchange.asked.arrival_s for exchange in exchanges)
    assert max(exchange.sent_s for exchange in exchanges) <= min(exchange.token_s[0] for exchange in exchanges)


def test_a_request_asks_for_exactly_its_lengths():
    with FakeServer() as server:
        measure(server, [SimRequest(0.0, 500, 9, "all"), SimRequest(0.0, 500, 9, "all")])
        first, second = server.calls
    assert server.keys == ["Bearer secret"] * 2
    assert (len(first["prompt"]), first["model"]) == (500, "tiny")
    assert (first["max_tokens"], first["min_tokens"], first["ignore_eos"], first["temperature"]) == (9, 9, True, 0)
    assert (first["stream"], first["stream_options"]["include_usage"]) == (True, True)
    assert 300 <= min(first["prompt"]) <= max(first["prompt"]) < 30_000
    assert first["prompt"] != second["prompt"]
    assert "vllm_xargs" not in first


def test_prompts_are_new_in_every_run():
    with FakeServer() as server:
        measure(server, at_once(1, prompt_tokens=50))
        measure(server, at_once(1, prompt_tokens=50))
    assert server.calls[0]["prompt"] != server.calls[1]["prompt"]


def test_lengths_are_declared_when_asked_for():
    with FakeServer() as server:
        measure(server, at_once(1, output_tokens=7), declare_lengths=True)
    assert server.calls[0]["vllm_xargs"] == {"expected_output_tokens": 7}


def test_every_token_has_its_time():
    exchange = one(answer_all)
    assert (exchange.outcome, exchange.prompt_tokens, exchange.status) == ("completed", 5, 200)
    assert len(exchange.token_s) == 3
    assert exchange.token_s == sorted(exchange.token_s)
    assert 0 < exchange.sent_s <= exchange.token_s[0] <= exchange.token_s[-1] <= exchange.ended_s


def test_a_rejection_keeps_its_retry_after():
    async def reject(call):
        return web.json_response(
            {"error": {"message": "come back later"}}, status=429, headers={"Retry-After": "2.5"}
        )

    exchange = one(reject)
    assert (exchange.outcome, exchange.status, exchange.retry_after_s) == ("rejected", 429, 2.5)
    assert exchange.message == "HTTP 429: come back later"
    assert exchange.token_s == []


def test_a_rejection_inside_the_stream_is_one_too():
    async def reject(call):
        response = await call.stream()
        await response.write(b'data: {"error": {"message": "full", "code": 429}}\n\n' + DONE)
        return response

    assert one(reject).outcome == "rejected"


@pytest.mark.parametrize("status", [400, 401, 404, 500, 503])
def test_any_other_status_is_a_failure(status):
    async def fail(call):
        return web.json_response({"message": "no"}, status=status)

    exchange = one(fail)
    assert (exchange.outcome, exchange.status, exchange.message) == ("failed", status, f"HTTP {status}: no")


def test_an_error_inside_the_stream_is_a_failure():
    async def break_down(call):
        response = await call.stream()
        await response.write(event(so_far=1))
        await response.write(b'data: {"error": {"message": "the engine died", "code": 500}}\n\n' + DONE)
        return response

    exchange = one(break_down)
    assert (exchange.outcome, exchange.message) == ("failed", "in the stream: the engine died")
    assert len(exchange.token_s) == 1


def test_a_stream_that_ends_too_early_is_a_failure():
    async def stop(call):
        response = await call.stream()
        await response.write(event(so_far=2))
        return response

    exchange = one(stop)
    assert (exchange.outcome, exchange.message) == ("failed", "the stream broke off after 2 tokens")


def test_a_connection_that_is_cut_is_a_failure():
    async def cut(call):
        response = await call.stream()
        await response.write(event(so_far=2))
        call.cut()
        return response

    exchange = one(cut)
    assert exchange.outcome == "failed"
    assert "incomplete" in exchange.message


@pytest.mark.parametrize(
    ("ending", "said"),
    [(event("", 0, "stop") + DONE, "without a token"), (event("a", 1, "abort") + DONE, "finish_reason is 'abort'")],
)
def test_an_answer_that_is_none_is_a_failure(ending, said):
    async def end(call):
        response = await call.stream()
        await response.write(ending)
        return response

    exchange = one(end)
    assert exchange.outcome == "failed"
    assert said in exchange.message


def test_a_server_that_is_gone_is_a_failure_of_each_request():
    with FakeServer() as server:
        pass
    (first, second), whole = measure(server, at_once(2))
    assert whole
    assert (first.outcome, second.outcome) == ("failed", "failed")
    assert "connection" in first.message.lower()
    assert first.sent_s is None


@pytest.mark.slow
def test_who_gets_no_end_in_time_timed_out():
    async def never(call):
        response = await call.stream()
        await response.write(event(so_far=1))
        await asyncio.Event().wait()
        return response

    exchange = one(never, timeout_s=1.0)
    assert exchange.outcome == "timed_out"
    assert exchange.message == "not complete 1 s after its arrival"
    assert len(exchange.token_s) == 1


def test_a_cancelled_run_keeps_what_there_is():
    first_ended, second_arrived = threading.Event(), threading.Event()

    async def answer_the_first(call):
        if call.number == 1:
            return await answer_all(call)
        await asyncio.to_thread(first_ended.wait, PATIENT_S)
        second_arrived.set()
        return await asyncio.Event().wait()

    def listen(exchange):
        if exchange.ended_s is not None and exchange.outcome == "completed":
            first_ended.set()

    requests = [SimRequest(0.0, 5, 3, "all"), SimRequest(0.2, 5, 3, "all"), SimRequest(3600.0, 5, 3, "all")]
    with FakeServer(answer_the_first) as server:
        exchanges, whole = measure(server, requests, stop_when=second_arrived, on_change=listen)
    assert not whole
    assert [exchange.outcome for exchange in exchanges] == ["completed", "cancelled"]


def test_everybody_hears_of_sending_and_ending():
    heard = []
    with FakeServer() as server:
        measure(server, at_once(2), on_change=lambda e: heard.append((e.index, e.ended_s is None, e.outcome)))
    assert sorted(heard) == [
        (0, False, "completed"), (0, True, "cancelled"), (1, False, "completed"), (1, True, "cancelled")
    ]


def models_of(url):
    async def ask():
        async with Server(url) as client:
            return await client.models()

    return asyncio.run(ask())


def test_the_model_s_context_is_read_in_either_server_s_words():
    with FakeServer(max_model_len=2048) as vllm, FakeServer(metadata={"max_request_context_length": 1024}) as ray:
        assert [model.max_model_len for model in models_of(vllm.url + "/v1/")] == [2048, 2048]
        assert [model.max_model_len for model in models_of(ray.url)] == [1024, 1024]


def test_what_is_no_openai_server_is_told(monkeypatch):
    answers = iter([httpx.Response(200, text="hello"), httpx.Response(401, json={"error": {"message": "key?"}})])
    transport = httpx.MockTransport(lambda request: next(answers))
    init = httpx.AsyncClient.__init__
    monkeypatch.setattr(httpx.AsyncClient, "__init__", lambda self, **o: init(self, transport=transport, **o))
    with pytest.raises(ServerError, match="no OpenAI-style server"):
        models_of("http://somewhere")
    with pytest.raises(ServerError, match="HTTP 401: key?"):
        models_of("http://somewhere")
