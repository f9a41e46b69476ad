"""The measures of a run, on requests small enough to work out by hand."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.tuning.slo import Slo
from simulator.output.metrics import (
    Delays,
    delays_of,
    good_requests,
    meets,
    rejected_requests,
    request_delays_s,
    summarise,
)
from simulator.output.rows import REQUEST_SCHEMA, RequestRow
from simulator.output.run_files import RunWriter

modest = settings(derandomize=True, deadline=None, max_examples=80)
NO_TARGET = {"slo_ttft_s": None, "slo_tpot_s": None}


def served(index, arrival_s, first_token_s, finished_s, output_tokens=3):
    return RequestRow(index, 0, "all", arrival_s, first_token_s, finished_s, 10, output_tokens, 0, "completed")


def rejected(index, arrival_s):
    return RequestRow(index, 0, "all", arrival_s, None, None, 10, 3, 0, "rejected")


def table(rows):
    return pa.Table.from_pylist([row._asdict() for row in rows], schema=REQUEST_SCHEMA)


# Arrivals 0, 10, 40; spans 40 s. Latencies 4 and 12, ttft 2 and 4, tpot (4-2)/2 = 1 and none.
THREE = [served(0, 0.0, 2.0, 4.0), rejected(1, 10.0), served(2, 40.0, 44.0, 52.0, output_tokens=1)]


def test_three_requests():
    assert summarise(table(THREE), **NO_TARGET) == {
        "requests": 3, "completed": 2, "rejected": 1, "gave_up": 0,
        "window_from_s": 0.0, "window_to_s": 40.0, "window_requests": 3,
        "goodput_rps": 2 / 40, "throughput_rps": 1 / 40, "output_tokens_per_s": 3 / 40,
        "latency_mean_s": 8.0, "latency_p50_s": 8.0, "latency_p99_s": pytest.approx(4 + 0.99 * 8),
        "ttft_mean_s": 3.0, "ttft_p50_s": 3.0, "ttft_p99_s": pytest.approx(2 + 0.99 * 2),
        "tpot_mean_s": 1.0, "tpot_p50_s": 1.0, "tpot_p99_s": 1.0,
        "prefix_hit_fraction": None, "served_ttft_miss_fraction": None, "served_tpot_miss_fraction": None,
        "wrong_admission_fraction": None, "rejected_in_window": 1, "rejection_p50_s": None, "rejection_p99_s": None,
    }  # fmt: skip


def test_rejections_and_misses_are_told_apart():
    rows = [
        served(0, 0.0, 2.0, 4.0)._replace(cached_tokens=0),  # TTFT 2, TPOT 1
        rejected(1, 10.0)._replace(rejected_s=10.5),
        rejected(2, 10.0)._replace(rejected_s=23.0, attempts=3, returned_s=22.0),
        RequestRow(3, 0, "all", 11.0, None, None, 10, 0, 0, "gave_up"),
        served(4, 12.0, 60.0, 61.0)._replace(cached_tokens=8, attempts=2, returned_s=59.0),  # TTFT 1, TPOT 0.5
        served(5, 40.0, 44.0, 52.0, output_tokens=1)._replace(cached_tokens=4),  # TTFT 4
    ]
    result = summarise(table(rows), slo_ttft_s=3.0, slo_tpot_s=0.6)
    assert (result["completed"], result["rejected"], result["gave_up"]) == (3, 2, 1)
    assert (result["rejected_in_window"], result["rejection_p50_s"]) == (2, 0.75)
    assert result["rejection_p99_s"] == pytest.approx(0.995)
    assert result["prefix_hit_fraction"] == 12 / 30, "of the prompts that ran"
    assert result["served_ttft_miss_fraction"] == pytest.approx(1 / 3)
    assert result["served_tpot_miss_fraction"] == pytest.approx(1 / 3)
    assert result["wrong_admission_fraction"] == pytest.approx(2 / 3)
    assert result["goodput_rps"] == 1 / 40, "a client that comes back is served in time if its last attempt is"
    assert good_requests(table(rows), (0.3, 0.9), Slo(3.0, 0.6)) == {4}
    assert rejected_requests(table(rows), (0.3, 0.9)) == [1, 2]


@pytest.mark.parametrize(
    ("targets", "good"),
    [
        ({"slo_ttft_s": 2.0, "slo_tpot_s": None}, 1),
        ({"slo_ttft_s": 4.0, "slo_tpot_s": None}, 2),
        ({"slo_ttft_s": None, "slo_tpot_s": 1.0}, 2),
        ({"slo_ttft_s": None, "slo_tpot_s": 0.5}, 1),  # the one-token answer still meets it
        ({"slo_ttft_s": 3.0, "slo_tpot_s": 0.5}, 0),
        ({"slo_ttft_s": None, "slo_tpot_s": None, "slo_latency_s": 4.0}, 1),
        ({"slo_ttft_s": None, "slo_tpot_s": None, "slo_latency_s": 3.9}, 0),
    ],
)
def test_every_given_target_must_be_met(targets, good):
    assert summarise(table(THREE), **targets)["goodput_rps"] == good / 40


def test_window_is_in_arrival_order():
    # 20 arrivals a second apart; the rows are in another order, as they end in another one.
    rows = [served(i, float(i), i + 0.5, i + 1.5) for i in range(20)]
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(20)]
    result = summarise(table(shuffled), **NO_TARGET)
    assert (result["window_from_s"], result["window_to_s"], result["window_requests"]) == (6.0, 17.0, 12)
    assert result["goodput_rps"] == 12 / 11
    # Finished at i + 1.5 within [6, 17]: i = 5 … 15.
    assert result["throughput_rps"] == 11 / 11
    assert result["output_tokens_per_s"] == 33 / 11


def test_window_edges_belong_to_it():
    rows = [served(i, float(i), i + 0.5, i + 1.0) for i in range(20)]
    # Finished at i + 1 within [6, 17]: i = 5 … 16, both edges counted.
    assert summarise(table(rows), **NO_TARGET)["throughput_rps"] == 12 / 11


def test_ties_in_arrival_are_split_by_index():
    rows = [served(i, 0.0 if i < 5 else 10.0, 11.0, 12.0 + i) for i in range(10)]
    result = summarise(table(rows), **NO_TARGET)
    assert result["window_requests"] == 6
    assert result["latency_p50_s"] == pytest.approx(np.median([15, 16, 7, 8, 9, 10]))


def test_another_window():
    rows = [served(i, float(i), i + 0.5, i + 1.5) for i in range(20)]
    result = summarise(table(rows), window=(0.0, 0.5), **NO_TARGET)
    assert (result["window_from_s"], result["window_to_s"], result["window_requests"]) == (0.0, 9.0, 10)
    assert summarise(table(rows), window=(0.5, 0.51), **NO_TARGET)["window_requests"] == 1


def test_one_request_has_delays_but_no_rate():
    result = summarise(table([served(0, 1.0, 2.0, 5.0, output_tokens=4)]), **NO_TARGET)
    assert (result["window_requests"], result["latency_p99_s"], result["ttft_mean_s"]) == (1, 4.0, 1.0)
    assert result["tpot_p50_s"] == 1.0
    assert result["goodput_rps"] is result["throughput_rps"] is result["output_tokens_per_s"] is None


def test_no_request_at_all():
    result = summarise(table([]), **NO_TARGET)
    assert (result["requests"], result["window_requests"]) == (0, 0)
    assert result["window_from_s"] is result["goodput_rps"] is result["latency_mean_s"] is None


def test_only_rejected():
    result = summarise(table([rejected(i, float(i)) for i in range(12)]), slo_ttft_s=1.0, slo_tpot_s=1.0)
    assert (result["completed"], result["rejected"], result["goodput_rps"]) == (0, 12, 0.0)
    assert result["throughput_rps"] == 0.0
    assert result["ttft_p50_s"] is result["tpot_p99_s"] is result["latency_mean_s"] is None


def test_file_folder_and_table_agree(tmp_path):
    with RunWriter(tmp_path, {"config": {}, "versions": {}}) as writer:
        for row in THREE:
            writer.request(row)
        from_file = summarise(writer.written_requests(), **NO_TARGET)
        writer.close(from_file)
    assert from_file == summarise(tmp_path, **NO_TARGET) == summarise(table(THREE), **NO_TARGET)


def test_delays_of_the_completed_requests():
    delays_s = request_delays_s(table(THREE))
    assert {name: values.tolist() for name, values in delays_s.items()} == {
        "latency": [4.0, 12.0], "ttft": [2.0, 4.0], "tpot": pytest.approx([1.0, math.nan], nan_ok=True),
    }  # fmt: skip
    assert request_delays_s(table(THREE), from_s=0.5)["latency"].tolist() == [12.0]
    assert request_delays_s(table(THREE), to_s=39.5)["ttft"].tolist() == [2.0]


@pytest.mark.parametrize("window", [(0.9, 0.3), (0.5, 0.5), (-0.1, 0.5), (0.3, 1.1), (math.nan, 0.9)])
def test_bad_window_is_named(window):
    with pytest.raises(ValueError, match=r"window is .*0 <= a < b <= 1"):
        summarise(table(THREE), window=window, **NO_TARGET)


@pytest.mark.parametrize("target_s", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("name", ["slo_ttft_s", "slo_tpot_s", "slo_latency_s"])
def test_bad_target_is_named(name, target_s):
    with pytest.raises(ValueError, match=f"{name} is {target_s}"):
        summarise(table(THREE), **(NO_TARGET | {name: target_s}))


@st.composite
def runs(draw):
    seconds = st.floats(0, 100, allow_nan=False)
    gaps = draw(st.lists(seconds, min_size=1, max_size=40))
    rows = []
    for index, arrival_s in enumerate(np.cumsum(gaps).tolist()):
        if draw(st.integers(0, 4)) == 0:
            rows.append(rejected(index, arrival_s))
            continue
        first_token_s = arrival_s + draw(seconds)
        tokens = draw(st.integers(1, 5))
        rows.append(served(index, arrival_s, first_token_s, first_token_s + (tokens > 1) * draw(seconds), tokens))
    return rows


@modest
@given(rows=runs(), target_s=st.floats(0.1, 100))
def test_bounds_that_always_hold(rows, target_s):
    free = summarise(table(rows), **NO_TARGET)
    tight = summarise(table(rows), slo_ttft_s=target_s, slo_tpot_s=target_s, slo_latency_s=target_s)
    assert free["completed"] + free["rejected"] == free["requests"] == len(rows)
    of_targets = dict.fromkeys(
        ("goodput_rps", "served_ttft_miss_fraction", "served_tpot_miss_fraction", "wrong_admission_fraction")
    )
    assert tight | of_targets == free | of_targets
    if free["goodput_rps"] is not None:
        span_s = free["window_to_s"] - free["window_from_s"]
        assert tight["goodput_rps"] <= free["goodput_rps"] <= free["window_requests"] / span_s
        assert free["throughput_rps"] <= free["completed"] / span_s
        assert free["throughput_rps"] <= free["output_tokens_per_s"] <= 5 * free["throughput_rps"] * (1 + 1e-12)
    for name in ("latency", "ttft", "tpot"):
        if free[f"{name}_p50_s"] is not None:
            assert 0 <= free[f"{name}_p50_s"] <= free[f"{name}_p99_s"]


@modest
@given(rows=runs(), order=st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(rows, order):
    shuffled = list(rows)
    order.shuffle(shuffled)
    first, second = summarise(table(rows), **NO_TARGET), summarise(table(shuffled), **NO_TARGET)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name] == (None if value is None else pytest.approx(value, rel=1e-9)), name


def test_one_request_is_measured_as_many_are():
    assert delays_of(1.0, 3.0, 11.0, 5) == Delays(10.0, 2.0, 2.0)
    assert math.isnan(delays_of(1.0, 3.0, 3.0, 1).tpot_s)
    many = delays_of(np.array([1.0, 1.0]), np.array([3.0, 3.0]), np.array([11.0, 3.0]), np.array([5, 1]))
    assert (many.latency_s.tolist(), many.ttft_s.tolist(), many.tpot_s[0]) == ([10.0, 2.0], [2.0, 2.0], 2.0)
    assert math.isnan(many.tpot_s[1])


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(), [True, True]),
        (Slo(latency_s=10.0), [True, True]), (Slo(latency_s=9.9), [False, True]),
        (Slo(ttft_s=2.0), [True, True]), (Slo(ttft_s=1.9), [False, False]),
        (Slo(tpot_s=2.0), [True, True]), (Slo(tpot_s=1.9), [False, True]),
    ],
    ids=str,
)
def test_a_good_request_is_within_every_target_and_one_token_has_no_time_per_token(slo, good):
    one, other = delays_of(1.0, 3.0, 11.0, 5), delays_of(1.0, 3.0, 3.0, 1)
    assert [bool(meets(one, slo)), bool(meets(other, slo))] == good
    both = Delays(*(np.array(pair) for pair in zip(one, other, strict=True)))
    assert meets(both, slo).tolist() == good
