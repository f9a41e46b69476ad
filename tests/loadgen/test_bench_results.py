"""The measures of a client, on exchanges small enough to work out by hand, and their way through the files."""

import json

import pyarrow.parquet as pq
import pytest

from loadgen.client import Exchange
from loadgen.results import is_good, summary_of, table_of, warnings_of, write_results
from scheduler.tuning.slo import Slo
from simulator.output.report import make_report
from simulator.output.rows import REQUEST_SCHEMA
from simulator.output.run_files import read_run
from simulator.workload.requests import SimRequest

NO_TARGET = Slo()


def answered(index, arrival_s, token_s, *, sent_s=None, asked_tokens=None):
    asked = SimRequest(arrival_s, 10, asked_tokens or len(token_s), "p10")
    return Exchange(index, asked, sent_s or arrival_s, token_s, token_s[-1], "completed", 200, prompt_tokens=10)


def ended(index, arrival_s, outcome, **known):
    return Exchange(index, SimRequest(arrival_s, 10, 3, "p10"), arrival_s, outcome=outcome, **known)


# ttft 2, 4; tpot (6 - 2) / 2 = 2 and none; latency 6, 4.
RUN = [
    answered(0, 0.0, [2.0, 3.0, 6.0], sent_s=0.5),
    ended(1, 10.0, "rejected", status=429, retry_after_s=3.0, message="HTTP 429: full"),
    ended(2, 20.0, "failed", message="gone"),
    ended(3, 30.0, "timed_out", message="late"),
    ended(4, 35.0, "cancelled"),
    answered(5, 40.0, [44.0]),
]


def test_a_measurement_of_six():
    summary = summary_of(table_of(RUN, NO_TARGET), NO_TARGET)
    counts = ("requests", "completed", "rejected", "failed", "timed_out", "cancelled", "good", "warmup_requests")
    assert [summary[name] for name in counts] == [6, 2, 1, 1, 1, 1, 2, 0]
    assert (summary["offered_rps"], summary["goodput_rps"]) == (6 / 40, 2 / 40)
    assert (summary["ttft_p50_s"], summary["ttft_p90_s"]) == (3.0, pytest.approx(2 + 0.9 * 2))
    assert (summary["tpot_mean_s"], summary["latency_mean_s"]) == (2.0, 5.0)
    assert summary["retry_after_p50_s"] == 3.0
    assert (summary["send_lag_p50_s"], summary["send_lag_p100_s"]) == (0.0, 0.5)
    assert summary["messages"] == {"HTTP 429: full": 1, "gone": 1, "late": 1}


def test_the_warm_up_is_not_measured():
    summary = summary_of(table_of(RUN, NO_TARGET), NO_TARGET, warmup=1)
    assert (summary["requests"], summary["completed"], summary["warmup_requests"]) == (5, 1, 1)
    assert (summary["window_from_s"], summary["window_to_s"], summary["ttft_p50_s"]) == (10.0, 40.0, 4.0)


@pytest.mark.parametrize(
    "slo", [
        Slo(), Slo(ttft_s=2.0), Slo(ttft_s=1.99), Slo(tpot_s=2.0), Slo(tpot_s=1.99), Slo(latency_s=5.0),
        Slo(ttft_s=3, tpot_s=9, latency_s=9),
    ],
)
def test_good_is_what_the_simulator_calls_good(slo):
    table = table_of(RUN, slo)
    summary = summary_of(table, slo)
    assert summary["good"] == pytest.approx(summary["goodput_rps"] * 40)
    assert table["good"].to_pylist() == [is_good(exchange, slo) for exchange in RUN]


def test_nobody_was_sent():
    summary = summary_of(table_of([], NO_TARGET), NO_TARGET)
    assert (summary["requests"], summary["goodput_rps"], summary["offered_rps"]) == (0, None, None)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_a_late_client_is_told():
    on_time = [answered(n, float(n), [n + 1.0, n + 2.0], sent_s=n + 0.049) for n in range(20)]
    late = [answered(n, float(n), [n + 1.0, n + 2.0], sent_s=n + 0.051) for n in range(20)]
    assert warnings(on_time) == []
    (said,) = warnings(late)
    assert "this client was late" in said
    assert "5% of the median" in said


def test_other_lengths_than_asked_are_told():
    (said,) = warnings([answered(0, 0.0, [1.0, 2.0], asked_tokens=5), answered(1, 0.1, [1.0])])
    assert said.startswith("1 outputs have another length than requested")


def warnings(exchanges):
    table = table_of(exchanges, NO_TARGET)
    return warnings_of(table, summary_of(table, NO_TARGET))


def test_files_say_what_was_measured(tmp_path):
    table = table_of(RUN, NO_TARGET)
    summary = summary_of(table, NO_TARGET)
    config = {"policy": "plain", "workload": {"name": "p10d3", "rate_rps": 0.1, "seed": 1}, "slo": {}}
    write_results(tmp_path / "run", table, config, summary)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["requests.parquet", "summary.json"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    rows = pq.read_table(tmp_path / "run" / "requests.parquet").to_pylist()
    assert rows == table.to_pylist()
    assert [row["token_s"] for row in rows] == [exchange.token_s for exchange in RUN]
    assert rows[1] | {"token_s": None} == {
        "index": 1, "replica": 0, "type": "p10", "arrival_s": 10.0, "first_token_s": None, "finished_s": None,
        "prompt_tokens": 10, "output_tokens": 3, "preemptions": 0, "outcome": "rejected", "asked_output_tokens": 3,
        "sent_s": 10.0, "good": False, "status": 429, "retry_after_s": 3.0, "message": "HTTP 429: full",
        "token_s": None, "rejected_s": None, "cached_tokens": None, "attempts": None, "returned_s": None,
    }


@pytest.mark.slow
def test_the_simulator_s_reader_and_report_take_it(tmp_path):
    table = table_of(RUN, NO_TARGET)
    config = {"policy": "plain", "workload": {"name": "p10d3", "rate_rps": 0.1, "seed": 1}, "slo": {}}
    write_results(tmp_path / "run", table, config, summary_of(table, NO_TARGET))
    run = read_run(tmp_path / "run")
    assert (run.config, run.summary["completed"], run.has_iterations) == (config, 2, False)
    assert run.requests(REQUEST_SCHEMA.names).num_rows == 6
    report = make_report([tmp_path / "run"], tmp_path / "report").read_text()
    assert "| plain | p10d3 | 0.1 | 1 | 6 |" in report
