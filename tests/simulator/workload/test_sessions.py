"""Conversations: every prompt is what was said before, in the order of time, at the rate asked for."""

from itertools import count, islice, pairwise

import numpy as np
import pytest
from pydantic import ValidationError

from simulator.workload.config import WorkloadConfig
from simulator.workload.prompts import answer_token_id, prompt_token_ids
from simulator.workload.requests import open_workload
from simulator.workload.sessions import Limits, SessionSpec, parse_sessions


def workload(lengths="sessions:", rate_rps=4.0, requests=2000, **more):
    return open_workload(WorkloadConfig(lengths=lengths, rate_rps=rate_rps, requests=requests, **more))


def session_of(text="sessions:turns=6", seed=1, **limits):
    return parse_sessions(text).session(np.random.default_rng(seed), count(1), Limits(**limits))


def test_defaults_are_as_documented():
    assert parse_sessions("sessions:") == parse_sessions("sessions") == SessionSpec()
    text = "sessions:turns=5~geometric,system=800,first=200~1,turn=120~1,output=250~1,think=20,token=0.03"
    assert parse_sessions(text) == SessionSpec()


def test_a_prompt_is_the_one_before_its_answer_and_something_new():
    turns = session_of()
    assert len(turns) == 6
    for before, after in pairwise(turns):
        prompt = prompt_token_ids(before.pieces, before.prompt_tokens, 0)
        said = prompt + [answer_token_id(before.answer, 0)] * before.output_tokens
        following = prompt_token_ids(after.pieces, after.prompt_tokens, 0)
        assert following[: len(said)] == said
        assert len(following) == after.prompt_tokens > len(said)
        assert not set(following[len(said) :]) & set(said)
        assert after.after_s >= before.after_s + before.output_tokens * 0.03


def test_sessions_share_the_system_prompt_alone():
    firsts = [request.pieces for request in workload(requests=300).requests() if len(request.pieces) == 2]
    assert {pieces[0] for pieces in firsts} == {(0, 800)}
    assert len({pieces[1].number for pieces in firsts}) == len(firsts) > 20
    (turn,) = session_of("sessions:turns=1,system=0,first=30,output=4")
    assert (turn.prompt_tokens, turn.output_tokens, len(turn.pieces)) == (30, 4, 1)


def test_a_session_ends_where_the_limits_do():
    text = "sessions:turns=50,system=100,first=50,turn=50,output=50"
    assert len(session_of(text)) == 50
    assert [turn.prompt_tokens for turn in session_of(text, max_total_tokens=400)] == [150, 250, 350]
    assert [turn.prompt_tokens for turn in session_of(text, max_prompt_tokens=349)] == [150, 250]
    assert min(turn.output_tokens for turn in session_of("sessions:turns=50", min_output_tokens=200)) >= 200
    made = workload(text, max_total_tokens=400)
    assert made.notes() == ("sessions have 3.0 turns instead of 50, as the limits on tokens allow no more",)
    with pytest.raises(ValueError, match="no turn of the sessions is left: max_total_tokens is 120"):
        workload(text, max_total_tokens=120)


@pytest.mark.parametrize("arrivals", ["poisson", "uniform", "gamma:cv=3"])
@pytest.mark.slow
def test_requests_come_in_order_at_the_rate_from_the_beginning(arrivals):
    made = workload(requests=4000, arrivals=arrivals)
    requests = list(made.requests())
    times = [request.arrival_s for request in requests]
    assert times == sorted(times)
    assert times[0] >= 0
    assert 4000 / times[-1] == pytest.approx(4.0, rel=0.1)
    assert 500 / times[499] == pytest.approx(4.0, rel=0.35), "conversations are under way at time 0"
    assert requests == list(made.requests()), "the same ones on every call"
    assert made.mix().rate_rps == 4.0
    mean = np.mean([request.prompt_tokens for request in requests])
    assert made.mix().merged().lengths.mean_prompt_tokens == pytest.approx(mean, rel=0.1)
    other = next(iter(workload(requests=4000, arrivals=arrivals, seed=1).requests()))
    assert other != requests[0]


def test_another_rate_leaves_the_sessions_as_they_are():
    slow, fast = (
        [request.prompt_tokens for request in islice(workload("sessions:turns=1", rate, 900).requests(), 800)]
        for rate in (2.0, 9.0)
    )
    assert slow == fast


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sessions:turns=0", "turns is '0'; it must be an integer >= 1, or MEAN~geometric"),
        ("sessions:turns=2.5", "turns is '2.5'"),
        ("sessions:first=0", "first is '0'; it must be an integer >= 1, or MEAN~CV"),
        ("sessions:system=3~1", "system is '3~1'; it must be an integer >= 0"),
        ("sessions:think=-1", "think is '-1'; it must be a number of seconds >= 0"),
        ("sessions:thnk=1", "at 'thnk=1': write sessions:turns=MEAN~geometric"),
        ("sessions:turn=1,turn=2", "at 'turn=2': .*each once"),
    ],
)
def test_a_mistake_is_named(text, said):
    with pytest.raises(ValidationError, match=said):
        WorkloadConfig(lengths=text, rate_rps=1.0, requests=1)
