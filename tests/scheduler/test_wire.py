"""Messages between processes of two releases: keys added, removed and renamed, in both directions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest

from scheduler.engine.active_thresholds import ActiveThresholds
from scheduler.fluid_params import FluidParams
from scheduler.messages import (
    Ack,
    Apply,
    Arrival,
    AskStats,
    Counters,
    Delivered,
    Drain,
    Finished,
    Gauges,
    Iteration,
    Report,
    RunningLengths,
    Stats,
    Telemetry,
)
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.survival import Survival
from scheduler.thresholds import EngineLimits, InvalidThresholds, SegmentThreshold, Thresholds, TypeThreshold
from scheduler.wire import (
    SCHEMA,
    OtherSchema,
    QuestionFailed,
    UnreadableMessage,
    answer_of,
    drain_question,
    offer_of,
    read_answer,
    read_question,
    stats_question,
    telemetry_question,
    with_delivered,
)

LIMITS = EngineLimits(
    kv_capacity_tokens=1600, block_tokens=16, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=1024
)
PARAMS = FluidParams(
    time_model=IterationTimeModel(0.01, 1e-6), survival=Survival(((0, 1.0), (40, 0.5), (99, 0.0))),
    kv_limit_tokens=1000,
    ttft_s=3.0, capacity_rps=2.0, iteration_s=0.05,
)
THRESHOLDS = Thresholds(
    version=3, policy="fluid", fluid=PARAMS, types=(TypeThreshold(name="short", n=4, max_output_tokens=50),),
    segments=(SegmentThreshold(end_output_tokens=8, total=16),), valid_for_s=60.0, reason="λ = 2/s",
)
TELEMETRY = Telemetry(
    engine_id="e", clock_s=1.5, cursor=9, limits=LIMITS, thresholds=THRESHOLDS, from_config=False,
    gauges=Gauges(running=2, waiting=1, kv_used_tokens=64), counters=Counters(arrivals=5, hold_s=0.25),
    iterations=(Iteration(6, 1.0, 0.1 + 0.2, 32, 0, 32, 1), Iteration(8, 1.1, 0.02, 0, 2, 34, 2)),
    arrivals=(Arrival(5, 0.5, 32, None), Arrival(7, 0.6, 8, 20)),
    finished=(Finished(9, 1.2, 32, 5, False, 16, 8, 0.1, None),), running=(RunningLengths(8, 3),), records_lost=1,
    delivered=(Delivered(1, 0.01, None), Delivered(2, None, 0.05)),
)
ACK = Ack(accepted=False, active_version=3, reason="version 3 is not newer", code="stale")
STATS = Stats.of_engine("e", LIMITS, THRESHOLDS, TELEMETRY.gauges)


def objects_in(message: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object within a decoded message, by the path to it."""
    if isinstance(message, dict):
        yield path, message
        for key, value in message.items():
            yield from objects_in(value, f"{path}.{key}".lstrip("."))
    elif isinstance(message, list):
        for place, value in enumerate(message):
            yield from objects_in(value, f"{path}[{place}]")


def changed(text: bytes, path: str, *, add: dict[str, Any] | None = None, remove: str = "") -> bytes:
    """The message as another release would write it."""
    message = json.loads(text)
    there = dict(objects_in(message))[path]
    if remove:
        del there[remove]
    there.update(add or {})
    return json.dumps(message).encode()


def paths_in(text: bytes) -> list[str]:
    return [path for path, _ in objects_in(json.loads(text))]


# The same release at both ends.


@pytest.mark.parametrize("answer", [TELEMETRY, replace(TELEMETRY, iterations=(), delivered=()), ACK, STATS])
def test_answers_survive_the_round_trip(answer: Telemetry | Ack | Stats) -> None:
    text = answer_of(answer)
    assert read_answer(text, type(answer)) == answer
    assert json.loads(text)["schema"] == SCHEMA


def test_questions_survive_the_round_trip() -> None:
    for automatic in (True, False):
        asked = read_question(offer_of(THRESHOLDS, automatic=automatic))
        assert asked == Apply(thresholds=THRESHOLDS, automatic=automatic)
    for cursor in (0, 7, None):
        assert read_question(telemetry_question(cursor)) == Report(cursor=cursor)
    assert read_question(stats_question()) == AskStats()
    for end in (True, False):
        assert read_question(drain_question(end=end)) == Drain(end=end)


@pytest.mark.parametrize(
    "change", [{"drain": word} for word in (True, None, 3, "", "soon", ["all"], {"all": 1})] + [{"until_s": 9}], ids=str
)
def test_a_drain_that_is_not_understood_is_no_drain(change: dict[str, Any]) -> None:
    with pytest.raises(UnreadableMessage, match="allowed: drain alone, waiting or all"):
        read_question(changed(drain_question(end=True), "", add=change))


@pytest.mark.parametrize("schema", [SCHEMA - 1, SCHEMA + 1, "1", None])
def test_a_drain_of_another_schema_version_is_not_read(schema: object) -> None:
    with pytest.raises(OtherSchema, match=f"this process version {SCHEMA}"):
        read_question(changed(drain_question(end=False), "", add={"schema": schema}))


def test_a_replica_adds_what_it_delivered() -> None:
    engine = answer_of(replace(TELEMETRY, delivered=()))
    assert read_answer(with_delivered(engine, TELEMETRY.delivered), Telemetry) == TELEMETRY
    assert with_delivered(answer_of(ACK), TELEMETRY.delivered) == answer_of(ACK)


def test_an_engine_that_cannot_answer_says_why() -> None:
    for kind in (Telemetry, Stats):
        with pytest.raises(QuestionFailed, match="version 3 is not newer"):
            read_answer(answer_of(ACK), kind)


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"[]", b"null", b'{"schema"', b"[" * 100_000], ids=lambda text: str(text[:9])
)
def test_what_is_no_object_is_unreadable(text: bytes) -> None:
    with pytest.raises(UnreadableMessage, match="not understood"):
        read_answer(text, Telemetry)


def test_records_are_read_by_name_and_not_by_place() -> None:
    message = json.loads(answer_of(TELEMETRY))
    message["iterations"] = dict(reversed(message["iterations"].items()))
    assert read_answer(json.dumps(message).encode(), Telemetry) == TELEMETRY
    for rows in ([[6, 1.0, 0.3, 32, 0, 32, 1]], {"seq": 3}, message["iterations"] | {"seconds": [0.1]}):
        with pytest.raises(UnreadableMessage, match="telemetry cannot be read: iterations"):
            read_answer(json.dumps(message | {"iterations": rows}).encode(), Telemetry)


# Answers: a replica of one release, a controller or ingress of another.


@pytest.mark.parametrize("answer", [TELEMETRY, ACK, STATS], ids=["telemetry", "ack", "stats"])
def test_a_newer_replica_s_added_key_is_ignored_wherever_it_stands(answer: Telemetry | Ack | Stats) -> None:
    text = answer_of(answer)
    paths = paths_in(text)
    assert len(paths) >= (12 if answer is TELEMETRY else 1)
    for path in paths:
        later = changed(text, path, add={"of_a_later_release": [[1], [2]]})
        assert read_answer(later, type(answer)) == answer, path


@pytest.mark.parametrize(
    ("path", "key", "missing"),
    [("", "engine_id", "engine_id"), ("", "gauges", "gauges"), ("limits", "max_num_seqs", "limits.max_num_seqs"),
     ("iterations", "seq", "iterations.seq: Field required"),
     ("iterations", "kv_tokens", "iterations.kv_tokens: Field required"),
     ("running", "output_tokens", "running.output_tokens: Field required"),
     ("thresholds.fluid", "survival", "thresholds.fluid.survival")],
)
@pytest.mark.parametrize("renamed", [False, True])
def test_a_needed_key_that_is_removed_or_renamed_is_named(path: str, key: str, missing: str, renamed: bool) -> None:
    """A release must not do this without another schema version; should it, nothing is misread."""
    there = dict(objects_in(json.loads(answer_of(TELEMETRY))))[path]
    text = changed(answer_of(TELEMETRY), path, remove=key, add={f"{key}_anew": there[key]} if renamed else None)
    with pytest.raises(UnreadableMessage, match="telemetry cannot be read") as error:
        read_answer(text, Telemetry)
    assert missing in str(error.value)


@pytest.mark.parametrize(
    ("path", "key", "expected"),
    [("counters", "hold_s", replace(TELEMETRY, counters=Counters(arrivals=5))),
     ("", "delivered", replace(TELEMETRY, delivered=())),
     ("finished", "cached_tokens", replace(TELEMETRY, finished=(TELEMETRY.finished[0]._replace(cached_tokens=0),))),
     ("thresholds", "valid_for_s", replace(TELEMETRY, thresholds=replace(THRESHOLDS, valid_for_s=None)))],
)
def test_a_key_that_an_older_replica_does_not_send_yet_has_its_default(
    path: str, key: str, expected: Telemetry
) -> None:
    assert read_answer(changed(answer_of(TELEMETRY), path, remove=key), Telemetry) == expected


@pytest.mark.parametrize("schema", [SCHEMA - 1, SCHEMA + 1, "1", None])
def test_an_answer_of_another_schema_version_is_not_read(schema: object) -> None:
    for answer in (TELEMETRY, ACK, STATS):
        with pytest.raises(OtherSchema, match=f"this process version {SCHEMA}"):
            read_answer(changed(answer_of(answer), "", add={"schema": schema}), type(answer))


KEYS_OF_SCHEMA_1 = {
    Telemetry: "schema engine_id clock_s cursor limits thresholds from_config gauges counters iterations arrivals "
    "finished running records_lost delivered",
    Stats: "schema engine_id slots running waiting kv_used_tokens kv_capacity_tokens thresholds_version",
    Ack: "schema accepted active_version reason code",
    Gauges: "running waiting held sitting_out kv_used_tokens",
    Counters: "arrivals completed aborted rejected preemptions iterations held hold_s ttft_misses tpot_misses "
    "latency_misses audited audited_met decode_steps decode_computed_tokens decode_gained_tokens decode_gained_squares",
    EngineLimits: "kv_capacity_tokens block_tokens max_num_seqs max_num_batched_tokens max_model_len "
    "speculative_tokens pipeline_depth",
    Thresholds: "version policy mode types segments max_running token_budget prefill_chunk_tokens wait_gate fluid "
    "max_hold_s valid_for_s pinned reason",
    TypeThreshold: "name n max_prompt_tokens max_output_tokens",
    SegmentThreshold: "end_output_tokens total",
    FluidParams: "time_model survival kv_limit_tokens block_tokens overflow_z iteration_s tpot_s ttft_s latency_s "
    "first_token_within_s miss_probability queue_limit prompt_flow_tokens capacity_rps steady_s variability "
    "tokens_per_step computed_per_step pipeline_depth cold",
    IterationTimeModel: "d0_s d1_s_per_kv_token d2_s_per_prefill_token d3_s_per_decode_token floor_s",
    Iteration: "seq at_s seconds prefill_tokens decode_tokens kv_tokens batch_size",
    Arrival: "seq at_s prompt_tokens known_output_tokens",
    Finished: "seq at_s prompt_tokens output_tokens aborted cached_tokens shared_tokens ttft_s tpot_s",
    RunningLengths: "prompt_tokens output_tokens",
    Delivered: "seq delay_s tpot_s",
}


@pytest.mark.parametrize("message", KEYS_OF_SCHEMA_1, ids=lambda message: message.__name__)
def test_within_a_schema_version_keys_are_added_only(message: Any) -> None:
    """Renaming or removing a key raises `SCHEMA`; the keys are then written down here anew."""
    now = set(getattr(message, "_fields", None) or [field.name for field in fields(message)])
    assert SCHEMA == 1 and set(KEYS_OF_SCHEMA_1[message].split()) <= now


# Thresholds: a controller of one release, an engine of another.


def answer_to(offer: bytes) -> tuple[Thresholds, str]:
    """The active thresholds after an offer, and the reason of a rejection."""
    active, why = ActiveThresholds(Thresholds(), LIMITS, lambda: 0.0), ""
    try:
        asked = read_question(offer)
        assert isinstance(asked, Apply)
        assert active.offer(asked).accepted
    except (InvalidThresholds, UnreadableMessage) as error:
        why = str(error)
    return active.current().thresholds, why


def test_an_engine_rejects_a_newer_controller_s_added_key_wherever_it_stands() -> None:
    offer = offer_of(THRESHOLDS, automatic=True)
    paths = paths_in(offer)
    assert set(paths) == {
        "", "apply", "apply.types[0]", "apply.segments[0]", "apply.fluid", "apply.fluid.time_model"
    }
    for path in paths:
        active, why = answer_to(changed(offer, path, add={"of_a_later_release": 1}))
        assert active == Thresholds(), path
        assert "of_a_later_release" in why, path


@pytest.mark.parametrize(
    ("path", "key"),
    [("apply.fluid", "survival"), ("apply.fluid", "kv_limit_tokens"), ("apply.fluid.time_model", "d0_s"),
     ("apply.types[0]", "n"), ("apply.segments[0]", "total")],
)
@pytest.mark.parametrize("renamed", [False, True])
def test_an_engine_rejects_thresholds_whose_needed_key_is_removed_or_renamed(
    path: str, key: str, renamed: bool
) -> None:
    offer = offer_of(THRESHOLDS, automatic=True)
    there = dict(objects_in(json.loads(offer)))[path]
    active, why = answer_to(changed(offer, path, remove=key, add={f"{key}_anew": there[key]} if renamed else None))
    assert active == Thresholds()
    assert (f"{key}_anew" if renamed else f"{key} is missing") in why


def test_an_engine_takes_an_older_controller_s_thresholds_without_its_own_added_key() -> None:
    active, why = answer_to(changed(offer_of(THRESHOLDS, automatic=True), "apply.fluid", remove="ttft_s"))
    assert (active, why) == (replace(THRESHOLDS, fluid=replace(PARAMS, ttft_s=None)), "")


@pytest.mark.parametrize("schema", [SCHEMA - 1, SCHEMA + 1, "1", None])
def test_an_engine_reads_no_thresholds_of_another_schema_version(schema: object) -> None:
    active, why = answer_to(changed(offer_of(THRESHOLDS, automatic=True), "", add={"schema": schema}))
    assert active == Thresholds()
    assert f"this process version {SCHEMA}" in why
