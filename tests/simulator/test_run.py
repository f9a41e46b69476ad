"""Whole simulations: the same seed is the same run, every policy keeps its own rules, and mistakes are named."""

import json
import re
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from replicas.routing_stats import RoutingStats
from router.ranking import best_first
from scheduler.model.profiles import load_profile
from simulator.config import SimulationError, options_from, simulation_config
from simulator.engine import routing
from simulator.engine.vllm_harness import iteration_results, make_request, make_scheduler
from simulator.output.run_files import read_run, versions
from simulator.run import simulate, simulate_options
from simulator.scenario.baselines import BASELINES
from simulator.workload.requests import open_workload

AZURE_TRACE = Path(__file__).parents[2].parent / "shared/data/traces/azure_conv_2023.csv"
KEYS = {
    "policy", "rate_rps", "requests", "completed", "rejected", "goodput_rps", "throughput_rps", "output_tokens_per_s",
    "latency_mean_s", "latency_p99_s", "ttft_mean_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "preemptions",
    "recomputed_tokens", "kv_peak_fraction", "iterations", "virtual_s", "wall_s",
}
SMALL = {"lengths": "0.5:p40d12+0.5:p90d30", "rate_rps": 30.0, "requests": 120, "seed": 3}
TIGHT = SMALL | {"kv_tokens": 800}
TRACE_HEADER = "arrived_at,num_prefill_tokens,num_decode_tokens\n"


def run_of(options, folder):
    """The run of these options as it lies on disk."""
    simulate(simulation_config(options), folder=folder)
    return read_run(folder)


def columns(run, *names):
    table = run.iterations(names)
    return tuple(table.column(name).to_numpy() for name in names)


def without_wall(summary):
    return {key: value for key, value in summary.items() if key != "wall_s"}


def trace_of(folder, *rows):
    path = folder / "trace.csv"
    path.write_text(TRACE_HEADER + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


# The summary.


def test_the_summary_is_json_with_everything_a_reader_needs():
    summary = simulate(simulation_config(SMALL | {"policy": "wait", "slo_ttft_s": 0.5}))
    assert set(summary) >= KEYS
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert (summary["policy"], summary["rate_rps"]) == ("wait", 30.0)
    assert (summary["requests"], summary["completed"], summary["rejected"], summary["stranded"]) == (120, 120, 0, 0)
    assert 0 < summary["ttft_mean_s"] < summary["latency_mean_s"] < summary["latency_p99_s"] < summary["virtual_s"]
    assert 0 < summary["goodput_rps"] <= 60
    assert summary["notes"] == []


@pytest.mark.parametrize("more", [{"policy": "nested-wait"}, {"policy": "fcfs", "replicas": 3}], ids=str)
def test_a_seed_is_a_run_bit_for_bit(more, tmp_path):
    first, again = (run_of(TIGHT | more, tmp_path / name) for name in ("first", "again"))
    assert without_wall(first.summary) == without_wall(again.summary)
    assert first.requests().equals(again.requests())
    assert first.iterations().equals(again.iterations())
    other = simulate(simulation_config(TIGHT | more | {"seed": 4}))
    assert other["latency_mean_s"] != first.summary["latency_mean_s"]


def test_progress_hears_how_many_have_arrived():
    heard = []
    simulate(simulation_config(SMALL), progress=lambda done, total: heard.append((done, total)))
    assert heard[0] == (0, 120)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert {total for _, total in heard} == {120}


def test_rows_and_summary_agree(tmp_path):
    run = run_of(TIGHT | {"policy": "fcfs", "give_up_s": 0.4, "window": [0, 1]}, tmp_path)
    rows, iterations = run.requests().to_pylist(), run.iterations().to_pylist()
    summary = run.summary
    assert sorted(row["index"] for row in rows) == list(range(120))
    outcomes = Counter(row["outcome"] for row in rows)
    assert outcomes["gave_up"] > 0
    assert (summary["completed"], summary["gave_up"]) == (outcomes["completed"], outcomes["gave_up"])
    assert (summary["rejected"], summary["rejected_in_window"]) == (0, 0), "no request was rejected"
    done = [row for row in rows if row["outcome"] == "completed"]
    assert summary["latency_mean_s"] == pytest.approx(np.mean([row["finished_s"] - row["arrival_s"] for row in done]))
    assert summary["ttft_mean_s"] == pytest.approx(np.mean([row["first_token_s"] - row["arrival_s"] for row in done]))
    assert summary["virtual_s"] == max(row["finished_s"] for row in done)
    assert summary["preemptions"] == sum(row["preemptions"] for row in rows) > 0
    assert summary["iterations"] == len(iterations)
    assert summary["kv_peak_fraction"] == pytest.approx(max(row["kv_used_tokens"] for row in iterations) / 800)
    computed = sum(row["prefill_tokens"] + row["decode_tokens"] for row in iterations)
    needed = sum(row["prompt_tokens"] + row["output_tokens"] - 1 for row in done)
    assert needed < computed <= needed + summary["recomputed_tokens"]


def test_rows_are_the_workload_s_requests(tmp_path):
    run = run_of(SMALL, tmp_path)
    sent = list(open_workload(simulation_config(SMALL).workload).requests())
    rows = sorted(run.requests().to_pylist(), key=lambda row: row["index"])
    names = ("arrival_s", "prompt_tokens", "output_tokens", "type")
    assert [tuple(row[name] for name in names) for row in rows] == [request[:4] for request in sent]


def test_the_header_says_what_was_run(tmp_path):
    run = run_of(SMALL | {"policy": "wait", "cap": 9, "max_hold_s": 0.5, "slo_ttft_s": 1.0}, tmp_path)
    assert run.versions == versions()
    config = run.config
    assert (config["policy"], config["cap"], config["slo"]["ttft_s"]) == ("wait", 9, 1.0)
    assert (config["workload"]["name"], config["workload"]["seed"]) == (SMALL["lengths"], 3)
    assert (config["kv_tokens"], config["token_budget"]) == (136_992, 2048)
    active = config["thresholds_in_force"]
    assert (active["policy"], active["max_running"], active["max_hold_s"]) == ("wait", 9, 0.5)
    assert [entry["name"] for entry in active["types"]] == ["output<=12", "output<=30"]
    assert "30.00 requests/s" in active["reason"]
    assert run_of(SMALL | {"policy": "sarathi"}, tmp_path).config["thresholds_in_force"] is None


# The policies.


@pytest.mark.parametrize("policy", BASELINES)
@pytest.mark.parametrize("workload", [SMALL, TIGHT], ids=["room", "tight"])
def test_every_baseline_completes_everything(policy, workload):
    summary = simulate(simulation_config(workload | {"policy": policy}))
    turned_away = summary["rejected"] if BASELINES[policy].rule else 0
    assert (summary["completed"] + turned_away, summary["stranded"]) == (120, 0)


def test_vllm_v0_never_mixes_prompts_and_decodes(tmp_path):
    mixed = {}
    for policy in ("vllm", "vllm-v0"):
        prefill, decode = columns(run_of(TIGHT | {"policy": policy}, tmp_path), "prefill_tokens", "decode_tokens")
        mixed[policy] = int(np.sum((prefill > 0) & (decode > 0)))
    assert mixed["vllm"] > 10
    assert mixed["vllm-v0"] == 0


def test_sarathi_computes_at_most_512_tokens_an_iteration(tmp_path):
    most = {}
    for policy in ("vllm", "sarathi"):
        run = run_of({"lengths": "p700d20", "rate_rps": 20.0, "requests": 40, "policy": policy}, tmp_path)
        most[policy] = int(sum(columns(run, "prefill_tokens", "decode_tokens")).max())
    assert most == {"vllm": 2048, "sarathi": 512}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_ours_without_thresholds_is_vllm_to_the_last_digit(asynchronous, tmp_path):
    options = TIGHT | {"async_scheduling": asynchronous}
    theirs = run_of(options | {"policy": "vllm"}, tmp_path / "vllm")
    ours = run_of(options | {"policy": "fcfs"}, tmp_path / "fcfs")
    assert theirs.requests().equals(ours.requests())
    assert without_wall(theirs.summary) | {"policy": "fcfs"} == without_wall(ours.summary)
    assert theirs.summary["preemptions"] > 0


@pytest.mark.parametrize("policy", ["vllm", "fcfs", "wait", "nested-wait"])
def test_a_cap_is_reached_and_never_exceeded(policy, tmp_path):
    run = run_of(SMALL | {"policy": policy, "cap": 4}, tmp_path)
    running, caps = columns(run, "running", "max_running")
    assert running.max() == 4
    assert set(caps) == {4}
    assert run.summary["completed"] == 120


def test_a_cap_from_memory_prevents_preemption():
    """No counts are feasible here, so that the cap alone does it: the counts are unlimited."""
    preemptions = {
        policy: sum(
            simulate(simulation_config(TIGHT | {"policy": policy, "solve_once": True, "seed": seed}))["preemptions"]
            for seed in range(1, 9)
        )
        for policy in ("fcfs", "wait")
    }
    assert preemptions["wait"] < preemptions["fcfs"] / 4


def test_declared_lengths_make_types_and_undeclared_ones_segments(tmp_path):
    def active(policy, **more):
        return run_of(SMALL | {"policy": policy, "solve_once": True, **more}, tmp_path).config["thresholds_in_force"]

    def kinds(thresholds):
        return bool(thresholds["types"]), bool(thresholds["segments"])

    assert kinds(active("wait")) == (True, False)
    assert kinds(active("wait", declare_lengths=False)) == (False, True)
    nested = active("nested-wait")
    assert kinds(nested) == (False, True)
    assert active("nested-wait", declare_lengths=True) == nested, "as in serving, it does not look at declarations"


def test_thresholds_given_replace_the_solved_ones(tmp_path):
    given = {"types": [{"name": "all", "n": 7}], "max_hold_s": 0.125, "policy": "wait"}
    active = run_of(SMALL | given, tmp_path).config["thresholds_in_force"]
    assert [(entry["name"], entry["n"]) for entry in active["types"]] == [("all", 7)]
    assert active["max_hold_s"] == 0.125
    assert run_of(SMALL | given | {"cap": 3}, tmp_path).config["thresholds_in_force"]["types"][0]["n"] == 3


def test_strict_mode_counts_whom_it_strands():
    strict = {"policy": "wait", "mode": "strict", "types": [{"name": "all", "n": 50}]}
    summary = simulate(simulation_config(SMALL | strict))
    assert summary["stranded"] > 0
    assert summary["completed"] + summary["stranded"] == 120


# Several replicas.


@pytest.mark.parametrize("policy", ["vllm", "wait"])
def test_three_replicas_share_thrice_the_load_and_are_as_fast_as_one(policy, tmp_path):
    one = simulate(simulation_config({"lengths": "p200d40", "rate_rps": 8.0, "requests": 60, "policy": policy}))
    options = {"lengths": "p200d40", "rate_rps": 24.0, "requests": 180, "policy": policy, "replicas": 3}
    run = run_of(options, tmp_path)
    assert run.summary["completed"] == 180
    counts = Counter(run.requests(["replica"]).column("replica").to_pylist())
    assert set(counts) == {0, 1, 2}
    assert max(counts.values()) - min(counts.values()) <= 30
    assert set(columns(run, "replica")[0]) == {0, 1, 2}
    assert run.summary["latency_mean_s"] == pytest.approx(one["latency_mean_s"], rel=0.1)


def test_equal_replicas_share_the_load_also_between_two_reports(tmp_path):
    lengths = "0.5:p100d20+0.5:p400d60"
    options = {"lengths": lengths, "rate_rps": 40.0, "requests": 500, "slo_ttft_s": 1.0, "slo_tpot_s": 0.05}
    run = run_of(options | {"policy": "fluid", "replicas": 2, "seed": 4}, tmp_path)
    of_second = {}
    for row in run.requests(["arrival_s", "replica"]).to_pylist():
        of_second.setdefault(int(row["arrival_s"]), []).append(row["replica"])
    shares = {second: sum(went) / len(went) for second, went in of_second.items() if len(went) >= 20}
    assert len(shares) > 8
    assert all(0.25 < share < 0.75 for share in shares.values()), shares


def test_conversations_stay_where_their_beginning_is_held():
    lengths = "sessions:system=0,first=600,turn=300,think=2"
    options = {"lengths": lengths, "rate_rps": 6.0, "requests": 160, "replicas": 4}
    hits = {
        router: simulate(simulation_config(options | {"policy": "fluid", "router": router}))["prefix_hit_fraction"]
        for router in ("fluid", "round-robin")
    }
    assert hits["fluid"] > 1.5 * hits["round-robin"], hits


def test_what_replicas_tell_makes_several_ingresses_know_as_much_as_one(monkeypatch):
    lengths = "sessions:turns=4,system=0,first=600,turn=300,output=20,think=2"
    options = {"lengths": lengths, "rate_rps": 6.0, "requests": 200, "replicas": 4, "policy": "fluid", "window": [0, 1]}

    def hits(ingresses):
        return simulate(simulation_config(options | {"ingresses": ingresses}))["prefix_hit_fraction"]

    alone = hits(1)
    assert hits(4) > 0.9 * alone
    monkeypatch.setattr(routing.LatestMarks, "note", lambda self, blocks: None)
    assert hits(4) < 0.7 * alone, "each knows a quarter"


def test_requests_go_where_the_routing_of_serving_puts_them(tmp_path, monkeypatch):
    assert routing.best_first is best_first
    chosen, known = [], []

    def worst_first(replicas, report, *args, **options):
        ranked = best_first(replicas, report, *args, **options)[::-1]
        chosen.append(ranked[0].index)
        known.append([report(replica) for replica in replicas])
        return ranked

    monkeypatch.setattr(routing, "best_first", worst_first)
    run = run_of(SMALL | {"policy": "fcfs", "replicas": 3, "cap": 50}, tmp_path)
    rows = sorted(run.requests(["index", "replica"]).to_pylist(), key=lambda row: row["index"])
    assert [row["replica"] for row in rows] == chosen
    assert Counter(chosen).most_common(1)[0][1] > 60, "the fullest gets even more"
    assert known[0] == [None] * 3, "no replica has reported in the first second"
    assert all(isinstance(stats, RoutingStats) and stats.slots == 50 for stats in known[-1])
    assert max(stats.occupied for stats in known[-1]) > 0


# Against vLLM's synchronous scheduler, driven by hand.


def latencies_by_hand(config):
    """Latency by request from the plainest loop: schedule, price, wait, update."""
    time_model = load_profile(config.profile).time_model
    scheduler = make_scheduler(
        Scheduler, blocks=config.kv_tokens // 16, max_model_len=config.max_model_len, max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=2048, async_scheduling=False,
    )
    coming = deque(enumerate(open_workload(config.workload).requests()))
    present, finished_s, now_s, preemptions = {}, {}, 0.0, 0
    while coming or present:
        if not present:
            now_s = max(now_s, coming[0][1].arrival_s)
        while coming and coming[0][1].arrival_s <= now_s:
            number, sent = coming.popleft()
            made = make_request(
                str(number), [7] * sent.prompt_tokens, sent.output_tokens, arrival_s=sent.arrival_s,
                max_model_len=config.max_model_len,
            )
            present[made.request_id] = made
            scheduler.add_request(made)
        output = scheduler.schedule()
        tokens = output.num_scheduled_tokens
        preemptions += len(output.preempted_req_ids or ())
        prefill = sum(count for count in tokens.values() if count > 1)
        kv_tokens = sum(present[name].num_computed_tokens for name in tokens)
        now_s += time_model.iteration_s(prefill, sum(tokens.values()) - prefill, kv_tokens)
        unready = [name for name in tokens if present[name].num_computed_tokens < present[name].num_tokens]
        scheduler.update_from_output(output, iteration_results(output, unready))
        for name in [name for name in tokens if present[name].is_finished()]:
            finished_s[int(name)] = now_s - present.pop(name).arrival_time
    return finished_s, preemptions


@pytest.mark.parametrize(
    "options",
    [
        TIGHT,
        pytest.param(
            {"trace": AZURE_TRACE, "rate_rps": 6.0, "requests": 300, "seed": 1, "kv_tokens": 12_000},
            marks=pytest.mark.skipif(not AZURE_TRACE.is_file(), reason="the Azure trace is not here"),
        ),
    ],
    ids=["synthetic", "azure"],
)
def test_synchronous_runs_equal_vllm_s_own_scheduler_driven_by_hand(options, tmp_path):
    options = options | {"async_scheduling": False, "prefix_caching": False, "max_total_tokens": 4096}
    run = run_of(options, tmp_path)
    by_hand, preemptions = latencies_by_hand(simulation_config(options))
    rows = run.requests().to_pylist()
    assert {row["index"]: row["finished_s"] - row["arrival_s"] for row in rows} == by_hand
    assert run.summary["preemptions"] == preemptions > 0


# Options and mistakes.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "wiat"}, f"policy = 'wiat'.*the policies are {', '.join(BASELINES)}"),
        ({"profile": "a200"}, "profile = 'a200'.*a100-llama2-7b"),
        ({"polcy": "wait"}, "no option 'polcy'; did you mean policy"),
        ({"max_holds": 1}, "no option 'max_holds'; did you mean max_hold_s"),
        ({"slo_tttft_s": 1}, "no option 'slo_tttft_s'; did you mean slo_ttft_s"),
        ({"zzz": 1}, "no option 'zzz'; the options are policy, profile"),
        ({"replicas": 0}, "replicas = 0: .*greater than or equal to 1"),
        ({"cap": 0}, "cap = 0"),
        ({"rate_rps": -1}, "workload.rate_rps = -1"),
        ({"lengths": "p10"}, "workload.lengths = 'p10'"),
        ({"lengths": None}, "give exactly one of them"),
        ({"window": [0.9, 0.3]}, "two fractions"),
        ({"slo_ttft_s": 0}, "slo.ttft_s = 0"),
        ({"slo": {"tttft_s": 1}}, "slo.tttft_s: no such key.*did you mean ttft_s"),
        ({"give_up_s": float("inf")}, "give_up_s = inf: .*finite"),
        ({"max_model_len": "long"}, "max_model_len = 'long'"),
    ],
)
def test_a_wrong_option_is_named(options, said):
    with pytest.raises(SimulationError, match=said) as error:
        simulation_config(SMALL | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "fcfs", "cap": 600}, "max_running = 600 .* from 1 to 512"),
        ({"policy": "vllm", "cap": 3000}, "the engine rejects its settings: .*2048.*max_num_seqs .3000."),
        ({"policy": "vllm-v0", "token_budget": 512}, r"max_num_batched_tokens \(512\) is smaller than max_model_len"),
        ({"policy": "wait", "max_hold_s": 100}, "max_hold_s = 100.0 .* seconds from 0 to 60"),
        ({"policy": "wait", "mode": "loose"}, "mode = 'loose'"),
        ({"policy": "wait", "types": [{"name": "all", "n": 1, "m": 1}]}, r"types\[0\].m = 1 .*no such field"),
        ({"policy": "wait", "types": [{"name": "all"}], "cap": 5}, r"types\[0\].n"),
        ({"policy": "wait", "types": 3, "cap": 5}, "types = 3"),
        ({"kv_tokens": 32}, "no request of p40d12.p90d30 is left"),
        ({"lengths": None, "trace": "nowhere.csv"}, "nowhere.csv"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_runs(options, said, tmp_path):
    with pytest.raises(SimulationError, match=said) as error:
        run_of(SMALL | options, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "requests.parquet").exists()


@pytest.mark.parametrize(
    ("rows", "said"), [([(1, 20, 5)] * 2, "all come at the same time"), ([(1, 0, 5)], "no usable row")]
)
@pytest.mark.parametrize("policy", ["vllm", "wait"])
def test_a_trace_that_cannot_be_replayed_is_a_simulation_error(rows, said, policy, tmp_path):
    with pytest.raises(SimulationError, match=said):
        simulate(simulation_config({"trace": trace_of(tmp_path, *rows), "arrivals": "replay", "policy": policy}))


def test_requests_longer_than_the_engine_are_left_out_and_noted(tmp_path):
    path = trace_of(tmp_path, (0, 100, 10), (1, 4090, 10), (2, 3000, 5), (3, 100, 10))
    replayed = {"trace": path, "arrivals": "replay"}
    summary = simulate(simulation_config(replayed))
    assert summary["completed"] == 3
    assert summary["notes"] == ["trace.csv: 1 of 4 rows left out (1 longer than 4096 tokens)"]
    summary = simulate(simulation_config(replayed | {"kv_tokens": 2048}))
    assert summary["completed"] == 2
    # vLLM keeps one block of its memory empty.
    assert summary["notes"] == ["trace.csv: 2 of 4 rows left out (2 longer than 2032 tokens)"]
    mixed = simulate(simulation_config(SMALL | {"lengths": "0.5:p40d12+0.5:p5000d30"}))
    assert mixed["completed"] == 120
    assert re.match(r"100.0% of p5000d30 left out", mixed["notes"][0])


@pytest.mark.parametrize("policy", BASELINES)
def test_the_longest_requests_that_are_let_in_fit(policy):
    options = {"lengths": "p32d16", "rate_rps": 5.0, "requests": 10, "policy": policy, "kv_tokens": 64}
    summary = simulate(simulation_config(options))
    assert (summary["completed"] > 0, summary["stranded"]) == (True, 0)
    with pytest.raises(SimulationError, match="no request of p32d17 is left: max_total_tokens is 48"):
        simulate(simulation_config(options | {"lengths": "p32d17"}))


def test_options_reach_every_part(tmp_path):
    flat = SMALL | {"slo_ttft_s": 0.5, "slo.tpot_s": 0.1, "workload.seed": 9, "thresholds.max_hold_s": 0.5, "cap": 3}
    flat["policy"] = "wait"
    nested = {
        "workload": SMALL | {"seed": 9}, "slo": {"ttft_s": 0.5, "tpot_s": 0.1}, "thresholds": {"max_hold_s": 0.5},
        "cap": 3, "policy": "wait",
    }
    config = simulation_config(flat)
    assert config == simulation_config(nested)
    assert (config.workload.seed, config.slo.ttft_s, config.slo.tpot_s) == (9, 0.5, 0.1)
    assert (config.thresholds, config.cap) == ({"max_hold_s": 0.5}, 3)
    summary = simulate_options(flat, tmp_path)
    assert without_wall(read_run(tmp_path).summary) == without_wall(summary)


def test_settings_are_yaml():
    settings = ["max_num_seqs=256", "mode=strict", "types=[{name: all, n: 2}]", "cap=null", "trace=a=b.csv"]
    assert options_from(settings) == {
        "max_num_seqs": 256, "mode": "strict", "types": [{"name": "all", "n": 2}], "cap": None, "trace": "a=b.csv",
    }
    for wrong, said in (("cap", "'cap' is not KEY=VALUE"), ("=3", "'=3' is not"), ("types=[", "the value of types")):
        with pytest.raises(SimulationError, match=re.escape(said)):
            options_from([wrong])


def test_counts_by_cap(tmp_path):
    options = SMALL | {"policy": "nested-wait", "counts": "by_cap"}
    with pytest.raises(SimulationError, match="give a cap too"):
        simulate(simulation_config(options))
    summary = simulate(simulation_config(options | {"cap": 8}), folder=tmp_path)
    active = read_run(tmp_path).config["thresholds_in_force"]
    assert active["max_running"] == 8
    assert active["segments"]
    assert max(read_run(tmp_path).iterations()["running"].to_pylist()) <= 8
    assert summary["completed"] == summary["requests"]


WITH_TARGETS = {
    "lengths": "0.5:p100d20+0.5:p400d60", "requests": 900, "seed": 4, "slo_ttft_s": 1.0, "slo_tpot_s": 0.05,
}


@pytest.mark.parametrize(
    "control", [{"solve_once": True}, {"period_s": 2.0}], ids=["solved beforehand", "solved live"]
)
def test_fluid_keeps_its_goodput_far_beyond_capacity(control):
    targets = WITH_TARGETS | {"policy": "fluid"} | control
    below = simulate(simulation_config(targets | {"rate_rps": 15.0}))
    assert below["rejected"] == 0
    peak = simulate(simulation_config(targets | {"rate_rps": 45.0}))["goodput_rps"]
    beyond = simulate(simulation_config(targets | {"rate_rps": 120.0}))
    assert beyond["goodput_rps"] > 0.9 * peak > 25
    assert beyond["ttft_p50_s"] < 0.5
    assert beyond["tpot_p99_s"] <= 0.0505
    assert beyond["preemptions"] == 0
    plain = simulate(simulation_config(WITH_TARGETS | {"rate_rps": 120.0, "policy": "vllm"}))
    assert plain["goodput_rps"] < 0.2 * beyond["goodput_rps"]


def test_fluid_without_targets_rejects_no_request_and_never_preempts():
    tight = TIGHT | {"policy": "fluid"}
    summary = simulate(simulation_config(tight))
    assert (summary["completed"], summary["rejected"], summary["preemptions"]) == (120, 0, 0)
    assert simulate(simulation_config(TIGHT | {"policy": "vllm"}))["preemptions"] > 0


def test_a_shift_to_long_answers_breaks_no_promise_per_token():
    shifting = {
        "lengths": "p100d10; 20s: p100d200", "rate_rps": 10.0, "requests": 500, "policy": "fluid", "period_s": 2.0,
        "slo_ttft_s": 2.0, "slo_tpot_s": 0.05,
    }
    summary = simulate(simulation_config(shifting))
    assert summary["completed"] + summary["rejected"] == 500
    assert summary["tpot_p99_s"] <= 0.0505
