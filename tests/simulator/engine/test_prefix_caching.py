"""Prefix caching as in vLLM: what requests share is computed once, and nothing else is taken for shared."""

import json
from pathlib import Path

import pytest

from replicas.prompt_blocks import BLOCK_TOKENS, blocks_of
from simulator.config import simulation_config
from simulator.output.run_files import read_run
from simulator.run import simulate
from simulator.workload.config import WorkloadConfig
from simulator.workload.prompts import Piece, answer_token_id, prompt_token_ids
from simulator.workload.requests import SimRequest, open_workload
from simulator.workload.traces import BadRow, TraceRow, open_trace

MOONCAKE_TRACE = Path(__file__).parents[3].parent / "shared/data/traces/mooncake_conversation.jsonl"


def line(timestamp, prompt, output, hash_ids):
    return {"timestamp": timestamp, "input_length": prompt, "output_length": output, "hash_ids": hash_ids}


@pytest.fixture
def mooncake(tmp_path):
    def write(*lines):
        path = tmp_path / "trace.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" if isinstance(entry, dict) else entry for entry in lines))
        return path

    return write


def run_of(folder, **options):
    simulate(simulation_config(options), folder=folder)
    return read_run(folder)


def prefilled(run):
    """Prompt tokens that were computed over the run; whatever comes alone in its iteration counts as a decode."""
    return sum(run.iterations(["prefill_tokens"]).column("prefill_tokens").to_pylist())


# Token ids.


def test_prompts_have_the_same_tokens_as_far_as_they_have_the_same_pieces():
    first = prompt_token_ids((Piece(0, 3), Piece(7, 2), Piece(9, 1)), 6, 0)
    second = prompt_token_ids((Piece(0, 3), Piece(7, 4)), 7, 1)
    assert first[:5] == second[:5]
    assert first[5] != second[5]
    assert (len(first), len(second)) == (6, 7)


def test_a_prompt_without_pieces_and_its_answer_share_no_token_with_any_other():
    seen = [prompt_token_ids(None, 5, number)[0] for number in range(50)]
    seen += [answer_token_id(None, number) for number in range(50)]
    assert len(set(seen)) == 100
    assert max(seen) < 0, "no piece has such a number"


# Mooncake's format.


def test_a_mooncake_trace_tells_what_its_prompts_share(mooncake):
    path = mooncake(line(0, 1100, 5, [0, 1, 2]), "\n", line(2500, 512, 7, [0]), line(2500, 513, 1, [0, 9]))
    trace = open_trace(path)
    assert (trace.layout, trace.has_timestamps) == ("mooncake", True)
    assert list(trace.rows()) == [
        TraceRow("line 1", 0.0, 1100, 5, (Piece(0, 512), Piece(1, 512), Piece(2, 76))),
        TraceRow("line 3", 2.5, 512, 7, (Piece(0, 512),)),
        TraceRow("line 4", 2.5, 513, 1, (Piece(0, 512), Piece(9, 1))),
    ]


def test_hashes_of_64_bits_and_more_tell_what_prompts_share_as_well(mooncake):
    """As block hashes are: a router packs them as token ids."""
    wide = [2**64 - 1, 2**64 - 2, 2**200 + 3]
    first, second = open_trace(mooncake(line(0, 1100, 5, wide), line(1, 513, 5, [wide[0], 2**63 + 1]))).rows()
    numbers = [piece.number for row in (first, second) for piece in row.pieces]
    assert len(set(numbers)) == 4 and numbers[0] == numbers[3]
    ids = [prompt_token_ids(row.pieces, row.prompt_tokens, 0) for row in (first, second)]
    one, other = (blocks_of(of_prompt, BLOCK_TOKENS) for of_prompt in ids)
    assert one[:8] == other[:8] and one[8:] != other[8:]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (line(0, 1100, 5, [0, 1]), "hash_ids must be 3 integers >= 0 for input_length 1100"),
        (line(0, 10, 5, None), "hash_ids must be 1 integers"),
        (line(0, 10, 5, [-4]), "hash_ids must be 1 integers >= 0"),
        (line(0, 10, 5, [1.5]), "hash_ids must be"),
        (line(0, 0, 5, []), "input_length is '0'"),
        (line(0, 10, True, [1]), "output_length is 'True'"),
        (line("soon", 10, 5, [1]), "timestamp is 'soon'; it must be a number of milliseconds"),
        (line(float("inf"), 10, 5, [1]), "timestamp is inf"),
        (line(10**400, 10, 5, [1]), "timestamp is 10000"),
        ("[1]\n", "it is no JSON object"),
        ('{"timestamp"\n', "Expecting ':'"),
    ],
)
def test_a_bad_line_is_named_and_the_rest_is_read(mooncake, entry, said):
    _, bad, last = open_trace(mooncake(line(0, 1, 1, [0]), entry, line(1, 1, 1, [0]))).rows()
    assert isinstance(bad, BadRow)
    assert bad.message.startswith("line 2: ")
    assert said in bad.message
    assert last.where == "line 3"


def test_a_file_of_another_format_is_rejected(mooncake):
    with pytest.raises(ValueError, match="is not a mooncake trace, which has a JSON object on every line: line 1: "):
        open_trace(mooncake("a,b\n1,2\n"))


def test_a_replay_keeps_what_is_shared_and_leaves_out_long_prompts(mooncake):
    path = mooncake(*(line(1000 * n, 600 + 512 * (n % 2), 4, [0, n, *([n + 50] * (n % 2))]) for n in range(6)))
    made = open_workload(WorkloadConfig(trace=path, arrivals="replay", rate_rps=1.0, max_prompt_tokens=1000))
    requests = list(made.requests())
    assert [request.arrival_s for request in requests] == [0.0, 1.0, 2.0], "the mean rate is that of what is left"
    assert [request.pieces[:2] for request in requests] == [(Piece(0, 512), Piece(n, 88)) for n in (0, 2, 4)]
    assert made.long_prompts == 3
    assert made.notes() == ("trace.jsonl: 3 of 6 rows left out (3 with prompts of more than 1000 tokens)",)


def test_other_arrivals_keep_the_order_in_which_requests_share(mooncake):
    path = mooncake(*(line(1000 * n, 600, 4 + n, [0, n]) for n in range(10)))
    firsts = set()
    for seed in range(8):
        requests = list(open_workload(WorkloadConfig(trace=path, rate_rps=2.0, requests=15, seed=seed)).requests())
        order = [request.pieces[1].number for request in requests]
        assert order == [(order[0] + n) % 10 for n in range(15)]
        assert [request.output_tokens for request in requests] == [4 + number for number in order]
        firsts.add(order[0])
    assert len(firsts) > 3


def test_a_spec_s_long_prompts_are_left_out():
    made = open_workload(
        WorkloadConfig(lengths="0.5:p40d8+0.5:p90d8", rate_rps=1.0, requests=20, max_prompt_tokens=50)
    )
    assert {request.prompt_tokens for request in made.requests()} == {40}
    assert made.mix().max_total_tokens == 48
    assert "100.0% of p90d8 left out" in made.notes()[0]
    assert "max_prompt_tokens 50" in made.notes()[0]


# What vLLM's cache makes of it.

SHARED = {"arrivals": "replay", "slo_ttft_s": 5.0}


@pytest.mark.parametrize("policy", ["vllm", "fcfs", "fluid"])
def test_shared_blocks_are_computed_once(mooncake, tmp_path, policy):
    path = mooncake(*(line(2000 * n, 1024 + 100, 20, [0, 1, 10 + n]) for n in range(8)))
    options = SHARED | {"trace": path, "policy": policy}
    cached = run_of(tmp_path / "on", **options)
    assert prefilled(cached) == 1024 + 8 * 100
    computed = run_of(tmp_path / "off", **options, prefix_caching=False)
    assert prefilled(computed) == 8 * 1124
    assert cached.summary["ttft_p50_s"] < computed.summary["ttft_p50_s"] / 3


def test_what_is_not_shared_costs_the_same_with_and_without(tmp_path):
    options = {"lengths": "0.5:p40d12+0.5:p90d30", "rate_rps": 30.0, "requests": 120, "seed": 3}
    cached, computed = (
        run_of(tmp_path / str(caching), **options, prefix_caching=caching) for caching in (True, False)
    )
    assert cached.requests().equals(computed.requests())
    assert cached.iterations().equals(computed.iterations())


def test_simrequests_say_nothing_of_their_prompts_unless_the_workload_does():
    assert SimRequest(0.0, 1, 2, "all")[4:] == (None, None)


@pytest.mark.skipif(not MOONCAKE_TRACE.is_file(), reason="the Mooncake trace is not here")
def test_the_mooncake_trace_is_read_whole():
    rows = list(open_trace(MOONCAKE_TRACE).rows())
    assert len(rows) == 12_031
    assert not any(isinstance(row, BadRow) for row in rows)
    assert all(sum(piece.tokens for piece in row.pieces) == row.prompt_tokens for row in rows)


@pytest.mark.parametrize("policy", ["vllm", "fluid"])
def test_later_turns_find_their_history_in_the_cache(policy):
    options = {
        "lengths": "sessions:turns=4,system=320,first=64,turn=64,output=32,think=5", "rate_rps": 2.0, "requests": 120,
        "policy": policy, "slo_ttft_s": 3.0, "slo_tpot_s": 0.08,
    }
    cached = simulate(simulation_config(options))
    # Of prompts of 384, 480, 576 and 672 tokens all but the last user's turn is there, but for the answer's last block.
    assert 0.8 < cached["prefix_hit_fraction"] < 0.88
    assert simulate(simulation_config(options | {"prefix_caching": False}))["prefix_hit_fraction"] == 0
