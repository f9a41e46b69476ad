"""Pipeline parallelism: a request advances once in as many iterations as there are stages, and all rules count that."""

from dataclasses import replace

import numpy as np
import pytest
from engine_harness import STEP_S, Engine
from synthetic_engine import LIMITS, PAPER, SyntheticEngine
from vllm.config import VllmConfig

from scheduler.fluid_params import FluidParams
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.steps import Steps
from scheduler.model.workload import Lengths, WorkloadMix
from scheduler.policies import UNKNOWN_TYPE, QueueView, RunningBatch, RunningRequest, Snapshot, Waiting, make_policy
from scheduler.policies.tpot_slack import TpotSlack
from scheduler.survival import Survival
from scheduler.thresholds import Thresholds
from scheduler.tuning.fluid_plan import solve_fluid_params
from scheduler.tuning.replica_model import ReplicaModel
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.slo import Slo
from scheduler.tuning.solve import tune_fluid

TIME_MODEL = IterationTimeModel(0.004, 4e-7, 6e-5, 6e-5, 0.011)
PARAMS = FluidParams(
    time_model=TIME_MODEL,
    survival=Survival.of(Lengths.point(500, 100)),
    kv_limit_tokens=100_000,
    iteration_s=0.05,
    ttft_s=2.0,
    prompt_flow_tokens=200.0,
    pipeline_depth=2,
)
MIX = WorkloadMix.from_lengths(Lengths.point(500, 100), 1.0)
BOTH_WAYS = pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])


def piped(asynchronous, **fields):
    return Engine(pipeline_parallel_size=2, async_scheduling=asynchronous, **fields)


# The engine.


@BOTH_WAYS
def test_a_request_is_in_no_batch_before_its_token_s_turn(asynchronous):
    engine = piped(asynchronous)
    engine.add("a", prompt=16, output=4)
    engine.run()
    turns = [step for step, batch in enumerate(engine.batches) if "a" in batch]
    assert turns == [0, 2, 4, 6] and engine.finished["a"].num_output_tokens == 4


@BOTH_WAYS
def test_a_policy_sees_the_group_that_the_next_iteration_advances(asynchronous):
    engine = piped(asynchronous)
    for name in "abc":
        engine.add(name, prompt=16, output=50)
    engine.step()
    engine.add("d", prompt=32, output=50)
    engine.step()
    alone, three = engine.scheduler._snapshot(0.0), (engine.step(), engine.scheduler._snapshot(0.0))[1]
    assert (alone.decode_tokens, three.decode_tokens) == (3, 1)
    assert (alone.next_is_fuller, three.next_is_fuller) == (True, False)
    assert (alone.kv_read_tokens, three.kv_read_tokens) == (3 * 17, 33)
    assert engine.scheduler.active.limits.pipeline_depth == 2


def test_an_iteration_s_seconds_are_a_stage_s_in_a_full_pipeline_and_in_an_empty_one():
    engine = piped(False)
    engine.add("a", prompt=16, output=3)
    engine.run()  # alone: each of its tokens takes two steps
    engine.add("b", prompt=16, output=9)
    engine.step()
    engine.add("c", prompt=16, output=9)
    engine.run()
    seconds = [record.seconds for record in engine.scheduler.recorder._iterations]
    assert seconds == pytest.approx([STEP_S / 2] + [STEP_S] * (len(seconds) - 1), rel=0.51)
    assert max(seconds) <= STEP_S * (1 + 1e-9), "never the time of all stages"


def test_vllm_keeps_a_batch_for_each_stage():
    config = piped(False).scheduler.vllm_config
    assert isinstance(config, VllmConfig) and config.max_concurrent_batches == 2


# The decisions.


def decide(*, advancing, full=False, fluid=PARAMS):
    heads = [Waiting(64, 0.0, "w")]
    view = QueueView(1, 0.0, lambda: iter(heads), lambda: iter(heads))
    snapshot = Snapshot(
        now_s=0.0, waiting={UNKNOWN_TYPE: view}, released=0,
        running=RunningBatch([RunningRequest("r", stage=50, kv_tokens=550)] * 100), kv_used_tokens=55_000,
        kv_capacity_tokens=100_000, most_tokens=2048, decode_tokens=advancing, kv_read_tokens=550 * advancing,
        next_is_fuller=full,
    )
    return make_policy(Thresholds(policy="fluid", fluid=fluid)).decide(snapshot)


def test_the_budget_is_for_the_group_that_the_next_iteration_advances():
    few, many = decide(advancing=20).token_budget, decide(advancing=80).token_budget
    per_token_s = TIME_MODEL.d2_s_per_prefill_token + TIME_MODEL.d1_s_per_kv_token
    decode_s = 60 * (TIME_MODEL.d3_s_per_decode_token + 550 * TIME_MODEL.d1_s_per_kv_token)
    assert few - many == pytest.approx(decode_s / per_token_s - 60, abs=2)


def test_a_newcomer_enters_an_iteration_with_fewer_requests():
    assert not decide(advancing=80, full=True).admit
    assert decide(advancing=20).admit == {UNKNOWN_TYPE: 1}


def test_slack_used_by_all_iterations_under_way_is_subtracted():
    def used_s(under_way):
        slack = TpotSlack(0.1, lambda stages, tokens: np.ones(len(stages)), under_way)
        return [
            slack.spare_s(np.array([11]), np.array([9.5]), 10.0, wanted, gain_s=0.0, misses=0.0)
            for wanted in (0.1, 0.0, 1.0)
        ]

    assert used_s(1)[2] == pytest.approx(0.4)
    assert used_s(2)[2] == pytest.approx(0.3)


# The fluid model.


def test_a_token_takes_an_iteration_of_every_stage():
    plan = {depth: solve_fluid_params(
        MIX, TIME_MODEL.of_stage(depth), LIMITS, Slo(tpot_s=0.06), steps=Steps(depth=depth)
    ) for depth in (1, 2, 4)}
    for depth, solved in plan.items():
        assert solved.fluid.token_s == pytest.approx(plan[1].fluid.token_s, rel=0.02)
        assert solved.fluid.iteration_s == pytest.approx(plan[1].fluid.iteration_s / depth, rel=0.02)
        assert solved.capacity_rps == pytest.approx(depth * plan[1].capacity_rps, rel=0.05)


def test_memory_holds_the_requests_of_all_groups():
    flat = solve_fluid_params(MIX, TIME_MODEL, replace(LIMITS, kv_capacity_tokens=20_000), Slo())
    deep = solve_fluid_params(
        MIX, TIME_MODEL.of_stage(2), replace(LIMITS, kv_capacity_tokens=20_000), Slo(), steps=Steps(depth=2)
    )
    assert deep.bottleneck == flat.bottleneck != "TPOT target"
    assert flat.equilibrium.limit == "memory"
    assert flat.capacity_rps < deep.capacity_rps < 2 * flat.capacity_rps
    assert deep.equilibrium.memory_tokens < 2 * flat.equilibrium.memory_tokens


def test_the_controller_takes_the_depth_from_the_engine_and_models_one_stage():
    settings = TuningSettings(targets=Slo(tpot_s=0.1))
    model = ReplicaModel(settings, PAPER, Thresholds(policy="fluid"))
    engine = SyntheticEngine(limits=replace(LIMITS, pipeline_depth=4))
    engine.traffic([(58, 147)], every_s=0.25, seconds=60)
    model.observe(engine.report())
    params = model.propose().thresholds.fluid
    assert params.pipeline_depth == 4
    assert params.time_model.iteration_s(0.0, 10.0, 1e4) == pytest.approx(PAPER.iteration_s(0.0, 10.0, 1e4) / 4)
    assert params.token_s == pytest.approx(4 * params.iteration_s)


def test_the_depth_is_the_engine_s_whatever_was_measured_of_steps():
    thresholds, _ = tune_fluid(
        Thresholds(policy="fluid"), MIX, TIME_MODEL, replace(LIMITS, pipeline_depth=2), Slo(tpot_s=0.1),
        miss_probability=0.01, steps=Steps(1.5, 2.0),
    )
    assert (thresholds.fluid.pipeline_depth, thresholds.fluid.tokens_per_step) == (2, 1.5)
