"""Workloads: what arrives when, again and again the same."""

import tracemalloc
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from scheduler.model.workload import Lengths
from simulator.workload.config import WorkloadConfig
from simulator.workload.requests import SimRequest, open_workload

AZURE_TRACE = Path(__file__).parents[3].parent / "shared/data/traces/azure_conv_2023.csv"
HEADER = "arrived_at,num_prefill_tokens,num_decode_tokens\n"


@pytest.fixture
def trace(tmp_path):
    def write(rows, name="trace.csv"):
        path = tmp_path / name
        path.write_text(HEADER + "".join(",".join(map(str, row)) + "\n" for row in rows))
        return path

    return write


def workload(**options):
    return open_workload(WorkloadConfig(**options))


def lengths(requests):
    return [(r.prompt_tokens, r.output_tokens, r.type_name) for r in requests]


SYNTHETIC = {"lengths": "0.7:p512d20+0.3:lmsys", "rate_rps": 8.0, "requests": 10_000}


@pytest.mark.parametrize("arrivals", ["poisson", "gamma:cv=2", "onoff:on=5,off=5", "uniform"])
def test_requests_come_in_order_and_the_same_every_time(arrivals):
    made = workload(**SYNTHETIC, arrivals=arrivals)
    first = list(made.requests())
    assert len(first) == 10_000
    assert first == list(made.requests()) == list(workload(**SYNTHETIC, arrivals=arrivals).requests())
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(first))
    assert lengths(first) != lengths(workload(**SYNTHETIC, arrivals=arrivals, seed=1).requests())


def test_fewer_requests_are_the_first_of_more():
    few = workload(**SYNTHETIC | {"requests": 10})
    assert list(few.requests()) == list(islice(workload(**SYNTHETIC).requests(), 10))


def test_rate_and_process_leave_the_lengths_as_they_are(trace):
    path = trace((n, n, 2 * n) for n in range(1, 50))
    for options in (SYNTHETIC, {"trace": path, "rate_rps": 1.0, "requests": 200}):
        as_it_is = lengths(workload(**options).requests())
        assert lengths(workload(**options | {"rate_rps": 99.0}).requests()) == as_it_is
        assert lengths(workload(**options, arrivals="gamma:cv=3").requests()) == as_it_is


def test_lengths_and_arrivals_are_independent():
    requests = list(workload(lengths="lmsys", rate_rps=1.0, requests=10_000).requests())
    gaps_s = np.diff([r.arrival_s for r in requests], prepend=0)
    for tokens in ([r.prompt_tokens for r in requests], [r.output_tokens for r in requests]):
        assert abs(np.corrcoef(gaps_s, tokens)[0, 1]) < 0.03


def test_mix_of_a_spec_has_a_type_per_component():
    made = workload(**SYNTHETIC)
    assert made.name == SYNTHETIC["lengths"]
    assert made.notes() == ()
    rates = {t.name: t.rate_rps for t in made.mix().types}
    assert rates == pytest.approx({"p512d20": 5.6, "lmsys": 2.4})
    seen = Counter(r.type_name for r in made.requests())
    assert seen["lmsys"] / 10_000 == pytest.approx(0.3, abs=0.02)


def test_mix_of_a_shifting_spec_is_its_average():
    made = workload(lengths="p1d1; 25s: p2d2", rate_rps=4.0, requests=400, arrivals="uniform")
    assert {t.name: t.rate_rps for t in made.mix().types} == pytest.approx({"p1d1": 1.0, "p2d2": 3.0})
    assert Counter(r.type_name for r in made.requests()) == {"p1d1": 99, "p2d2": 301}
    assert [t.name for t in workload(lengths="p1d1; 25s: p2d2", rate_rps=4, requests=100).mix().types] == ["p1d1"]


def test_limits_on_a_spec_keep_the_rate_and_are_told():
    made = workload(lengths="0.5:p500d50+0.5:p10d5", rate_rps=2.0, requests=5000, max_total_tokens=549)
    requests = list(made.requests())
    assert {r.type_name for r in requests} == {"p10d5"}
    assert len(requests) / requests[-1].arrival_s == pytest.approx(2, rel=0.05)
    assert made.notes() == ("100.0% of p500d50 left out (max_total_tokens 549, min_output_tokens 1)",)
    assert [(t.name, t.rate_rps) for t in made.mix().types] == [("p10d5", 2.0)]


def test_a_resampled_trace_gives_each_row_once_per_epoch(trace):
    rows = [(0, n, 3 * n) for n in range(1, 301)]
    made = workload(trace=trace(rows), rate_rps=5.0, requests=750)
    requests = list(made.requests())
    assert requests == list(made.requests())
    prompts = [r.prompt_tokens for r in requests]
    assert sorted(prompts[:300]) == sorted(prompts[300:600]) == list(range(1, 301))
    assert prompts[:300] != sorted(prompts[:300])
    assert prompts[:300] != prompts[300:600]
    assert len(set(prompts[600:])) == 150
    assert all(r.output_tokens == 3 * r.prompt_tokens and r.type_name == "all" for r in requests)
    assert len(list(workload(trace=made.config.trace, rate_rps=5.0).requests())) == 300


def test_epochs_of_a_tiny_trace_go_on_across_blocks(trace):
    made = workload(trace=trace([(0, 1, 1), (0, 2, 2), (0, 3, 3)]), rate_rps=5.0, requests=12_000)
    prompts = np.array([r.prompt_tokens for r in made.requests()]).reshape(-1, 3)
    assert np.array_equal(np.sort(prompts, axis=1), np.tile([1, 2, 3], (4000, 1)))


def test_mix_of_a_resampled_trace(trace):
    (only,) = workload(trace=trace([(0, 1, 2), (0, 3, 4)], "chat.csv"), rate_rps=5.0).mix().types
    assert (only.name, only.rate_rps, only.lengths) == ("all", 5.0, Lengths.from_pairs([(1, 2), (3, 4)]))


def test_replay_keeps_the_traces_times_shifted_to_zero(trace):
    made = workload(trace=trace([(10.5, 1, 2), (10.5, 3, 4), (14.5, 5, 6)], "chat.csv"), arrivals="replay")
    requests = [SimRequest(0.0, 1, 2, "all"), SimRequest(0.0, 3, 4, "all"), SimRequest(4.0, 5, 6, "all")]
    assert list(made.requests()) == list(made.requests()) == requests
    assert (made.name, made.notes(), made.rows_read) == ("chat", (), 3)
    assert made.mix().rate_rps == pytest.approx(0.5)
    assert list(workload(trace=made.config.trace, arrivals="replay", requests=2).requests()) == requests[:2]


def test_replay_at_another_rate_stretches_time(trace):
    path = trace([(n * n, 1, 2) for n in range(11)])
    made = workload(trace=path, arrivals="replay", rate_rps=1.0)
    assert [r.arrival_s for r in made.requests()] == pytest.approx([n * n / 10 for n in range(11)])
    assert made.mix().rate_rps == 1.0
    first = workload(trace=path, arrivals="replay", rate_rps=1.0, requests=3)
    assert [r.arrival_s for r in first.requests()] == pytest.approx([0, 0.5, 2])


def test_replay_reads_only_what_is_asked_for(trace):
    made = workload(trace=trace((n, n + 1, 1) for n in range(50_000)), arrivals="replay")
    requests = made.requests()
    assert made.rows_read == 0
    assert [r.arrival_s for r in islice(requests, 10)] == list(range(10))
    assert made.rows_read == 10


@pytest.mark.slow
def test_memory_of_a_long_run_stays_flat(trace):
    path = trace((n, 1 + n % 3, 1) for n in range(30_000))
    for options in ({"trace": path, "arrivals": "replay"}, SYNTHETIC | {"requests": 60_000}):
        made = workload(**options)
        next(made.requests())
        tracemalloc.start()
        count = sum(1 for _ in made.requests())
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count >= 30_000
        assert peak_bytes < 3_000_000


def test_rows_left_out_are_counted_and_named(trace):
    rows = [(0, 9, 9), (1, "x", 1), (2, 50, 51), (3, 5, 1), (2.5, 9, 9), (4, 9, 8)]
    limits = {"max_total_tokens": 100, "min_output_tokens": 2}
    made = workload(trace=trace(rows), arrivals="replay", **limits)
    assert [r.arrival_s for r in made.requests()] == [0, 4]
    assert (made.rows_read, made.bad_rows, made.too_long, made.too_short) == (6, 2, 1, 1)
    assert made.notes() == (
        "trace.csv: 4 of 6 rows left out (2 bad: line 3: num_prefill_tokens is 'x'; it must be an integer between 1 "
        "and 2147483647; line 6: it comes 0.5 s before a row above it; 1 longer than 100 tokens; 1 with fewer than 2 "
        "output tokens)",
    )
    assert made.mix().merged().lengths == Lengths.from_pairs([(9, 9), (9, 8)])
    sampled = workload(trace=made.config.trace, rate_rps=1.0, **limits)
    assert sampled.mix().merged().lengths == Lengths.from_pairs([(9, 9), (9, 9), (9, 8)])
    assert (sampled.rows_read, sampled.bad_rows, sampled.too_long, sampled.too_short) == (6, 1, 1, 1)


def test_only_the_first_bad_rows_are_named(trace):
    (note,) = workload(trace=trace([(0, 1, 1)] + [(0, 0, 1)] * 30), rate_rps=1.0).notes()
    assert "30 bad: line 3: " in note
    assert "line 22: " in note
    assert "line 23: " not in note
    assert note.endswith("; …)")


def test_replay_of_fewer_requests_than_asked_is_told(trace):
    made = workload(trace=trace([(0, 1, 1), (1, 1, 1)]), arrivals="replay", requests=5)
    assert len(list(made.requests())) == 2
    assert made.notes() == ("trace.csv: 2 of the 5 requests asked for",)


def test_a_trace_that_cannot_be_used(trace):
    path = trace([(0, 0, 1), (0, 60, 60)])
    with pytest.raises(ValueError, match=r"has no usable row; .*1 bad: line 2.*1 longer than 100 tokens"):
        workload(trace=path, rate_rps=1.0, max_total_tokens=100)
    with pytest.raises(ValueError, match="has no usable row; .*1 longer"):
        list(workload(trace=path, arrivals="replay", max_total_tokens=100).requests())
    with pytest.raises(ValueError, match="has no usable row; it is empty"):
        workload(trace=trace([], "empty.csv"), rate_rps=1.0)
    with pytest.raises(ValueError, match="no mean rate"):
        workload(trace=trace([(7, 1, 1)] * 2, "burst.csv"), arrivals="replay").mix()
    path.write_text("num_prefill_tokens,num_decode_tokens\n1,1\n")
    with pytest.raises(ValueError, match="'replay', but .* has no timestamps"):
        workload(trace=path, arrivals="replay")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": None}, "lengths is None and trace is None; give exactly one"),
        ({"trace": "t.csv"}, "give exactly one"),
        ({"requests": None}, "requests is None; with lengths it must say how many"),
        ({"rate_rps": None}, "rate_rps is None; only arrivals 'replay'"),
        ({"arrivals": "replay"}, "that needs a trace"),
        ({"arrivals": "gama"}, "the processes are: poisson"),
        ({"lengths": "p5"}, "at 'p5'"),
        ({"rate_rps": 0}, "rate_rps"),
        ({"rate_rps": float("inf")}, "rate_rps"),
        ({"requests": 0}, "requests"),
        ({"seed": -1}, "seed"),
        ({"trace_format": "xml"}, "trace_format"),
        ({"rate": 3}, "rate"),
    ],
)
def test_a_configuration_that_cannot_be(change, message):
    with pytest.raises(ValidationError, match=message):
        WorkloadConfig(**SYNTHETIC | change)


@pytest.mark.skipif(not AZURE_TRACE.exists(), reason="the shared trace folder is not here")
def test_the_azure_conversation_trace():
    made = workload(trace=AZURE_TRACE, arrivals="replay")
    requests = list(made.requests())
    assert (len(requests), made.notes()) == (19_366, ())
    assert requests[1] == SimRequest(4.314579, 396, 109, "all")
    assert made.mix().rate_rps == pytest.approx(19_365 / 3501.721937)
    resampled = workload(trace=AZURE_TRACE, rate_rps=5.0)
    assert sorted(lengths(resampled.requests())) == sorted(lengths(requests))
    assert resampled.mix().merged().lengths == made.mix().merged().lengths
