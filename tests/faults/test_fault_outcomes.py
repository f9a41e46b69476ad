"""What became of a request, told from the bytes of its response."""

import asyncio

import pytest
from aiohttp import web
from fake_server import DONE, FakeServer, answer_all, event

from benchmarks.faults.outcomes import (
    Outcome,
    Seen,
    account,
    arrived_from,
    in_flight_at,
    outcome_of,
    seen_of,
    to_the_last,
)
from loadgen.client import Exchange, Server
from loadgen.open_loop import OpenLoop
from scheduler.tuning.slo import Slo
from simulator.workload.requests import SimRequest

ERROR_EVENT = b'data: {"error": {"message": "the engine died", "code": 500}}\n\n'


def streamed(*pieces, then_cut=False):
    """HTTP 200 and these bytes; then a clean end, or a connection closed under the client."""
    async def answer(call):
        response = await call.stream()
        for piece in pieces:
            await response.write(piece)
        if then_cut:
            call.cut()
        return response

    return answer


def plain(status):
    async def answer(call):
        return web.json_response({"error": {"message": "no"}}, status=status)

    return answer


async def silence(call):
    await asyncio.sleep(30)
    return await call.stream()


THREE = (event(so_far=1), event(so_far=2), event(so_far=3, finish="length"))


@pytest.mark.parametrize(("answer", "outcome"), [
    (streamed(*THREE, DONE), Outcome.COMPLETE),
    (streamed(*THREE), Outcome.COMPLETE),
    (plain(429), Outcome.REJECTED),
    (plain(500), Outcome.ERROR_BEFORE),
    (plain(503), Outcome.ERROR_BEFORE),
    (streamed(ERROR_EVENT), Outcome.ERROR_BEFORE),
    (streamed(THREE[0], ERROR_EVENT, DONE), Outcome.ERROR_WITHIN),
    (streamed(THREE[0], event(so_far=2, finish="abort"), DONE), Outcome.ERROR_WITHIN),
    (streamed(*THREE[:2]), Outcome.CUT),
    (streamed(*THREE[:2], DONE), Outcome.CUT),
    (streamed(THREE[0], event(so_far=2, finish="stop"), DONE), Outcome.CUT),
    (streamed(), Outcome.CUT),
    (streamed(DONE), Outcome.CUT),
    (streamed(*THREE[:2], then_cut=True), Outcome.LOST),
    (silence, Outcome.HUNG),
])
def test_the_outcome_of_a_response(answer, outcome):
    with FakeServer(answer) as fake:
        exchange = asyncio.run(ask(fake.url))
    assert outcome_of(exchange) is outcome, exchange


async def ask(url, timeout_s=1.0):
    async with Server(url) as server:
        loop = OpenLoop(server, "tiny", timeout_s=timeout_s)
        await loop.run([SimRequest(0.0, 2, 3, "p2d3")])
    return loop.exchanges[0]


def test_nothing_listens():
    exchange = asyncio.run(ask("http://127.0.0.1:9"))
    assert outcome_of(exchange) is Outcome.LOST


def test_a_client_that_leaves():
    async def leave(url):
        async with Server(url) as server:
            loop = OpenLoop(server, "tiny", timeout_s=9.0)
            task = asyncio.create_task(loop.run([SimRequest(0.0, 2, 3, "p2d3")]))
            while not loop.exchanges:
                await asyncio.sleep(0)
            task.cancel()
            await task
        return loop.exchanges[0]

    with FakeServer(silence) as fake:
        assert outcome_of(asyncio.run(leave(fake.url))) is Outcome.HUNG_UP


@pytest.mark.parametrize(("ttft_s", "good"), [(5.0, True), (1e-6, False)])
def test_good_is_complete_within_the_targets(ttft_s, good):
    with FakeServer(answer_all) as fake:
        seen = seen_of(asyncio.run(ask(fake.url, 9.0)), Slo(ttft_s=ttft_s))
    assert (seen.outcome, seen.good, seen.tokens) == (Outcome.COMPLETE, good, 3)
    assert seen.as_dict()["outcome"] == "complete"


def test_a_request_under_way_has_no_outcome():
    with pytest.raises(ValueError, match="request 4 is under way"):
        seen_of(Exchange(4, SimRequest(0.0, 2, 3, "p2d3")), Slo())


def seen(arrival_s, ended_s, outcome=Outcome.COMPLETE):
    return Seen(arrival_s, ended_s, outcome)


def test_in_flight_and_new():
    requests = [seen(1, 2), seen(1, 5), seen(4.9, 30, Outcome.HUNG), seen(5, 6)]
    assert in_flight_at(requests, 5) == requests[1:3]
    assert arrived_from(requests, 5) == requests[3:]


def test_the_account_is_to_the_last():
    requests = [seen(0, 1), seen(0, 1, Outcome.REJECTED), seen(0, 1, Outcome.ERROR_WITHIN)]
    counts = account(requests, 3)
    assert sum(counts.values()) == 3 and to_the_last(counts)
    assert account(requests, 4)["unaccounted"] == 1 and not to_the_last(account(requests, 4))


@pytest.mark.parametrize("outcome", [Outcome.CUT, Outcome.LOST, Outcome.HUNG])
def test_one_that_is_cut_lost_or_hangs_breaks_the_account(outcome):
    assert not to_the_last(account([seen(0, 1), seen(0, 1, outcome)], 2))
