"""Engines of one kind learn together: known truths, engines that differ, garbage, and engines that are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from pool_engines import LAW, NOISE, KnownEngine
from synthetic_engine import LIMITS

from scheduler.digest import BUCKETS, Digest, LengthSums, TimeSums
from scheduler.estimation.engine_records import EngineRecords
from scheduler.estimation.estimates import Estimates
from scheduler.estimation.intervals import mean_estimate
from scheduler.estimation.length_counts import CLASSES, EDGES, LengthCounts, class_of, output_bucket, prompt_bucket
from scheduler.estimation.output_lengths import Answers, product_limit
from scheduler.estimation.pool import HALF_LIFE_S, SILENT_S, Pool
from scheduler.estimation.traffic_monitor import length_classes

LEAST = 20
GUESS = LAW.faster(1.3)
"""What the profile says: too fast, and for all engines alike."""
BATCHES = ((0.0, 40.0, 30_000.0), (300.0, 40.0, 30_000.0), (0.0, 60.0, 10_000.0))


class Observed:
    """Engines with the records that their replicas keep."""

    def __init__(self, engines: Sequence[KnownEngine]) -> None:
        self.records = {engine.name: (engine, EngineRecords(GUESS, 60.0, LEAST)) for engine in engines}

    def run(self, pool: Pool, periods: int, seconds: float = 5.0, skip: Sequence[str] = ()) -> None:
        for _ in range(periods):
            for name, (engine, records) in self.records.items():
                records.observe(engine.period(seconds))
                if name not in skip:
                    pool.take(name, records.digest(0.01), engine.now_s)
            pool.settle(max(engine.now_s for engine, _ in self.records.values()))


def pooled(engines: Sequence[KnownEngine], periods: int = 6) -> tuple[Pool, Observed]:
    pool, observed = Pool(LIMITS.max_model_len), Observed(engines)
    observed.run(pool, periods)
    return pool, observed


def known(pool: Pool, name: str) -> Estimates:
    found = pool.estimates(name, LEAST)
    assert found is not None
    return found


def off(estimates: Estimates, slow: float = 1.0) -> float:
    """Largest relative error of the iteration times."""
    return max(
        abs(estimates.time_model.iteration_s(*batch) / (slow * LAW.iteration_s(*batch)) - 1) for batch in BATCHES
    )


def test_equal_engines_share_one_estimate_that_is_right() -> None:
    pool, _ = pooled([KnownEngine(seed) for seed in range(12)])
    all_of_them = {id(known(pool, f"r{seed}")) for seed in range(12)}
    assert len(all_of_them) == 1, "one plan serves them all"
    one = known(pool, "r0")
    assert off(one) < 0.01
    assert one.lengths.mean_output_tokens == pytest.approx(150, rel=0.06)
    assert one.lengths.mean_prompt_tokens == pytest.approx(300, rel=0.06)
    assert one.rates.total.covers(8.0)
    assert one.reuse.computed == pytest.approx(0.7, abs=0.01)
    assert one.error.std == pytest.approx(NOISE, rel=0.1)
    assert not one.cold and pool.deviations == {}


def test_estimates_tighten_with_the_root_of_the_number_of_engines() -> None:
    """Their intervals do, and so do their errors over many tries."""
    widths, errors = {}, {}
    for number in (4, 16):
        wrong = []
        for attempt in range(5):
            pool, _ = pooled([KnownEngine(100 * attempt + seed, output=40.0) for seed in range(number)], 4)
            one = known(pool, f"r{100 * attempt}")
            lengths = one.lengths
            std = float(np.sqrt(lengths.weights @ (lengths.output_tokens - lengths.mean_output_tokens) ** 2))
            outputs = mean_estimate(lengths.mean_output_tokens, std, one.samples)
            wrong.append(lengths.mean_output_tokens / 40 - 1)
        rate, spread = one.rates.total, one.error.std_estimate
        widths[number] = np.array([
            (outputs.high - outputs.low) / outputs.value, (rate.high - rate.low) / rate.value,
            (spread.high - spread.low) / spread.value,
        ])
        errors[number] = float(np.sqrt(np.mean(np.square(wrong))))
    assert widths[4] / widths[16] == pytest.approx([2.0, 2.0, 2.0], rel=0.25)
    assert errors[16] < 0.8 * errors[4]


def test_a_slow_engine_is_found_and_named_and_its_siblings_keep_their_estimates() -> None:
    engines = [KnownEngine(seed) for seed in range(8)]
    alone, _ = pooled(engines)
    pool, _ = pooled([KnownEngine(seed, slow=1.9 if seed == 5 else 1.0) for seed in range(8)])
    assert set(pool.deviations) == {"r5"}
    found = pool.deviations["r5"]
    assert found.low < 1.9 < found.high and found.factor == pytest.approx(1.9, rel=0.02)
    assert found.in_words == "runs 1.9 times slower than its siblings"
    assert off(known(pool, "r5"), 1.9) < 0.02
    for batch in BATCHES:
        before, after = (known(one, "r0").time_model.iteration_s(*batch) for one in (alone, pool))
        assert after == pytest.approx(before, rel=0.005)
    assert known(pool, "r0") is known(pool, "r7")


@pytest.mark.parametrize("slow", [0.6, 1.25])
def test_of_two_engines_the_other_one_is_told_apart_too(slow: float) -> None:
    pool, _ = pooled([KnownEngine(0), KnownEngine(1, slow=slow)])
    (named,) = pool.deviations
    assert named == ("r0" if slow < 1 else "r1"), "of two, the faster one is the usual"
    assert off(known(pool, "r0")) < 0.02 and off(known(pool, "r1"), slow) < 0.02


def test_a_difference_below_what_matters_is_nobody_s_name() -> None:
    pool, _ = pooled([KnownEngine(seed, slow=1.02 if seed == 2 else 1.0) for seed in range(6)])
    assert pool.deviations == {}
    assert off(known(pool, "r2"), 1.02) < 0.02


def test_two_kinds_in_one_pool_get_the_times_of_their_own_kind() -> None:
    """Nothing tells the controller that half of the accelerators are others."""
    pool, _ = pooled([KnownEngine(seed, slow=1.0 if seed % 2 else 0.5) for seed in range(12)])
    for seed in range(12):
        assert off(known(pool, f"r{seed}"), 1.0 if seed % 2 else 0.5) < 0.03
    assert len({id(known(pool, f"r{seed}")) for seed in range(12)}) <= 4, "and few plans serve them all"


def test_an_engine_with_other_proportions_gets_coefficients_of_its_own() -> None:
    """Slow memory, and compute as fast as the others': no one factor describes it."""
    odd = replace(LAW, d1_s_per_kv_token=3 * LAW.d1_s_per_kv_token)
    pool, _ = pooled([KnownEngine(seed, law=odd if seed == 3 else LAW) for seed in range(6)])
    times = known(pool, "r3").time_model
    for batch in ((200.0, 40.0, 20_000.0), (200.0, 40.0, 50_000.0), (20.0, 40.0, 35_000.0)):
        assert times.iteration_s(*batch) == pytest.approx(odd.iteration_s(*batch), rel=0.05)
    assert off(known(pool, "r0")) < 0.01


def test_a_new_engine_knows_what_its_siblings_do_before_its_first_iteration() -> None:
    pool, observed = pooled([KnownEngine(seed) for seed in range(6)])
    observed.records["new"] = (KnownEngine(50), EngineRecords(GUESS, 60.0, LEAST))
    engine, records = observed.records["new"]
    records.observe(engine.period(0.5, iterations=(), arrivals=(), finished=(), running=()))
    pool.take("new", records.digest(0.01), 30.0)
    pool.settle(30.0)
    assert known(pool, "new") is known(pool, "r0"), "measured knowledge, not a guess"


def test_a_new_engine_that_is_slow_is_found_within_its_first_report() -> None:
    pool, _ = pooled([KnownEngine(seed) for seed in range(6)])
    engine, records = KnownEngine(50, slow=1.9), EngineRecords(GUESS, 60.0, LEAST)
    records.observe(engine.period(1.5))  # 60 iterations
    pool.take("new", records.digest(0.01), 30.0)
    pool.settle(30.0)
    assert pool.deviations["new"].factor == pytest.approx(1.9, rel=0.05)
    assert off(known(pool, "new"), 1.9) < 0.05
    assert known(pool, "new").lengths == known(pool, "r0").lengths


def test_an_engine_with_other_traffic_moves_away_and_the_others_do_not() -> None:
    pool, _ = pooled([KnownEngine(seed, output=450.0 if seed == 4 else 150.0) for seed in range(8)], periods=12)
    assert known(pool, "r4").lengths.mean_output_tokens == pytest.approx(450, rel=0.12)
    assert known(pool, "r0").lengths.mean_output_tokens == pytest.approx(150, rel=0.06)
    assert known(pool, "r0") is known(pool, "r7")


def test_a_rate_and_prefix_hits_of_one_s_own_are_kept() -> None:
    pool, _ = pooled([
        KnownEngine(seed, rate_rps=16.0 if seed == 1 else 8.0, hits=0.8 if seed == 2 else 0.3) for seed in range(6)
    ])
    assert known(pool, "r1").rates.total.value == pytest.approx(16, rel=0.2)
    assert known(pool, "r0").rates.total.value == pytest.approx(8, rel=0.05)
    assert known(pool, "r2").reuse.computed == pytest.approx(0.25, abs=0.06)
    assert known(pool, "r0").reuse == known(pool, "r3").reuse


def test_one_engine_has_no_siblings() -> None:
    pool, _ = pooled([KnownEngine(0)])
    assert pool.estimates("r0", LEAST) is None and pool.deviations == {}


def test_nothing_is_shared_before_enough_outputs_have_ended() -> None:
    pool, observed = Pool(LIMITS.max_model_len), Observed([KnownEngine(seed) for seed in range(3)])
    observed.run(pool, 1, seconds=0.5)
    assert pool.estimates("r0", LEAST) is None
    observed.run(pool, 3)
    assert known(pool, "r0").samples >= LEAST


def garbage() -> dict[str, Digest]:
    records = EngineRecords(GUESS, 60.0, LEAST)
    engine = KnownEngine(77)
    for _ in range(4):
        records.observe(engine.period())
    good = records.digest(0.01)
    sums, lengths = good.time_sums, good.lengths
    huge = tuple(tuple(10**9 for _ in row) for row in lengths.ended)
    return {
        "times": replace(good, time_sums=replace(sums, product=tuple(1e9 * one for one in sums.product))),
        "weight": replace(good, time_sums=replace(sums, weight=1e12, square=1e12)),
        "no matrix": replace(good, time_sums=replace(sums, features=tuple(-one for one in sums.features))),
        "outputs": replace(good, lengths=replace(lengths, ended=huge, at_risk=huge)),
        "long outputs": replace(good, lengths=LengthSums(
            classes=(64,), ended=((*[0] * (BUCKETS - 1), 10**6),), at_risk=((10.0**6,) * BUCKETS,),
            tokens=(*[0] * (BUCKETS - 1), 10**12),
        )),
        "hits": replace(good, cached_tokens=10**15, prompt_tokens=10**15),
    }


@pytest.mark.parametrize("kind", garbage())
def test_garbage_of_one_engine_poisons_no_other(kind: str) -> None:
    pool, _ = pooled([KnownEngine(seed) for seed in range(8)])
    before = known(pool, "r0")
    pool.take("bad", garbage()[kind], 30.0)
    pool.settle(30.0)
    after = known(pool, "r0")
    for batch in BATCHES:
        assert after.time_model.iteration_s(*batch) == pytest.approx(before.time_model.iteration_s(*batch), rel=0.01)
    assert after.lengths.mean_output_tokens == pytest.approx(before.lengths.mean_output_tokens, rel=0.02)
    assert after.reuse.computed == pytest.approx(before.reuse.computed, abs=0.05)
    assert "r0" not in pool.deviations


@pytest.mark.parametrize("changes", [
    {"rate_rps": (float("nan"), 0.0, 1.0)}, {"errors": (float("inf"),) * 8},
    {"lengths": LengthSums(classes=(64,), ended=((-5,),), at_risk=((1.0,),))},
    {"lengths": LengthSums(classes=(64,), ended=((10**12,),), at_risk=((1.0,),))},
    {"time_sums": TimeSums(weight=400.0, features=(1e308,) * 15, product=(1e308,) * 5, square=1.0)},
    {"errors": (0.0, 1e300, *[0.0] * 6)}, {"rate_since_s": 1e300}, {"margin": 1e300}, {"delay_s": -1.0},
    {"lengths": LengthSums(classes=(64,), ended=((1,) * (BUCKETS + 1),), at_risk=((1.0,),))},
])
def test_a_digest_with_impossible_values_is_not_taken(changes: dict[str, object]) -> None:
    pool, _ = pooled([KnownEngine(seed) for seed in range(3)])
    bad = replace(garbage()["hits"], **changes)
    with pytest.raises(ValueError):
        pool.take("bad", bad, 30.0)
    assert len(pool) == 3


def test_what_engines_knew_that_are_gone_is_history_and_fades() -> None:
    pool, _ = pooled([KnownEngine(seed) for seed in range(6)])
    pool.keep_only([])
    engine, records = KnownEngine(50), EngineRecords(GUESS, 60.0, LEAST)
    records.observe(engine.period(1.0))
    pool.take("new", records.digest(0.01), 40.0)
    pool.settle(40.0)
    assert known(pool, "new").lengths.mean_output_tokens == pytest.approx(150, rel=0.08)
    assert off(known(pool, "new")) < 0.02
    remembered = known(pool, "new").samples
    pool.take("new", records.digest(0.01), 40.0 + HALF_LIFE_S)
    pool.settle(40.0 + HALF_LIFE_S)
    assert known(pool, "new").samples == pytest.approx(remembered / 2, rel=0.1)


def test_a_silent_engine_is_gone_and_comes_back_with_its_next_report() -> None:
    pool, observed = pooled([KnownEngine(seed) for seed in range(4)])
    observed.run(pool, round(SILENT_S / 5) + 2, skip=["r2"])
    assert pool.estimates("r2", LEAST) is None and len(pool) == 3
    observed.run(pool, 1)
    assert known(pool, "r2") is known(pool, "r0")


def test_an_engine_whose_passes_are_far_apart_is_not_silent_for_missing_one() -> None:
    pool, observed = pooled([KnownEngine(seed) for seed in range(4)])
    observed.run(pool, 1, seconds=40.0)
    observed.run(pool, 1, seconds=40.0, skip=["r2"])
    observed.run(pool, 1, seconds=40.0, skip=["r2"])
    assert len(pool) == 4
    observed.run(pool, 2, seconds=40.0, skip=["r2"])
    assert len(pool) == 3


def test_a_slow_engine_that_is_gone_leaves_no_slow_history() -> None:
    pool, _ = pooled([KnownEngine(seed, slow=1.9 if seed == 1 else 1.0) for seed in range(4)])
    pool.keep_only(["r0"])
    pool.settle(30.0)
    assert off(known(pool, "r0")) < 0.01 and pool.deviations == {}


def test_buckets_of_lengths_hold_every_length_once() -> None:
    tokens = np.arange(1, 70_000)
    at = output_bucket(tokens)
    assert (tokens > EDGES[at]).all() and (tokens <= EDGES[at + 1]).all() and len(EDGES) == BUCKETS + 1
    assert (4 ** class_of(prompt_bucket(tokens)) == length_classes(tokens)).all()
    assert int(output_bucket(np.array([10**7]))[0]) == BUCKETS - 1
    assert class_of(prompt_bucket(np.array([10**9])))[0] == CLASSES - 1


def test_counts_give_the_lengths_of_the_records() -> None:
    """Censored and truncated outputs in proportion; the survival within half a bucket of the records' own."""
    random = np.random.default_rng(3)
    full = np.clip(np.round(random.lognormal(5.0, 0.8, 6000)), 1, 3000).astype(np.int64)
    prompts = np.clip(np.round(random.lognormal(5.5, 0.9, 6000)), 1, 3000).astype(np.int64)
    begun = random.uniform(-3000, 4000, 6000)
    ended, seen = begun + full <= 4000, np.floor(4000 - begun).astype(np.int64)
    answers = Answers.of([], [])
    outputs, entry = np.where(ended, full, seen), np.maximum(0.0, -begun)
    kept = outputs > entry
    answers = Answers(prompts[kept], outputs[kept], ended[kept], entry[kept])
    exact, counted = product_limit(answers, 4096), LengthCounts.of(answers).lengths(longest=4096)
    assert counted.mean_output_tokens == pytest.approx(exact.mean_output_tokens, rel=0.03)
    assert counted.mean_prompt_tokens == pytest.approx(exact.mean_prompt_tokens, rel=0.03)
    at = EDGES[(EDGES > 0) & (EDGES < 3000)]
    assert np.abs(counted.survivals(at) - exact.survivals(at)).max() < 0.06, "half of a bucket"


def test_counts_survive_the_message() -> None:
    answers = Answers.of([(5, 1), (300, 40), (300, 41), (9000, 2000)], [(70, 12), (70, 900)])
    counts = LengthCounts.of(answers)
    again = LengthCounts.read(counts.written())
    for field in ("ended", "at_risk", "tokens", "running", "prompts", "prompt_tokens"):
        assert np.allclose(getattr(again, field), getattr(counts, field), atol=0.05)


@pytest.mark.parametrize(("living", "gone"), [(2, 4), (3, 3), (4, 0)])
def test_lengths_that_change_after_replicas_have_gone_are_followed_at_once(living: int, gone: int) -> None:
    pool, observed = pooled([KnownEngine(seed, output=150.0) for seed in range(living + gone)], periods=24)
    observed.records = dict(list(observed.records.items())[:living])
    pool.keep_only(observed.records)
    for engine, _ in observed.records.values():
        engine.output = 600.0
    observed.run(pool, 24)
    mean = known(pool, "r0").lengths.mean_output_tokens
    assert mean > 0.85 * 600, "what those that are gone had is no part of it any more"


def test_a_replica_that_is_alone_is_not_called_slow_beside_those_that_are_gone() -> None:
    pool, _ = pooled([KnownEngine(0)])
    pool.keep_only([])
    slow = KnownEngine(7, slow=1.5)
    slow.now_s = 30.0
    Observed([slow]).run(pool, 10)
    assert pool.deviations == {} and known(pool, "r7") is not None
