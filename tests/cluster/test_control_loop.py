"""The controller's passes over replicas that judge thresholds by the engine's own rules."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from fake_store import FakeStore
from synthetic_engine import LIMITS, PAPER, SyntheticEngine

from cluster import controller as controller_module
from cluster.controller import ControllerActor, ControlLoop
from cluster.keeper import ControllerKeeper
from cluster.settings import ControllerConfig, ModelSettings
from cluster.tuned import TunedModel
from replicas import questions, served
from replicas.actor_calls import ReplicaUnavailable
from replicas.ranks import ServedModel, engine_name, replica_of
from scheduler.messages import Ack, Apply, Telemetry
from scheduler.thresholds import SegmentThreshold, Thresholds, parse_thresholds
from scheduler.tuning.replica_model import Proposal, ReplicaModel
from scheduler.tuning.slo import NO_SLO, Slo
from scheduler.wire import SCHEMA, answer_of, read_question

CONFIG = ControllerConfig(
    profile="a100-llama2-7b-paper", min_finished=20, window_s=60.0, validity_s=120.0, period_s=5.0
)
CONFIGURED = Thresholds(policy="nested_wait", max_hold_s=0.25)
DEPLOYMENT = "HeadraceServer:m"
STEADY = [(58, 147), (40, 60), (30, 300)]
Offered = tuple[str, Thresholds, Ack]


class Cluster:
    """Replicas by name, all on one clock; stands where the calls to replica actors go."""

    def __init__(self) -> None:
        self.clock_s = 10_000.0
        self.engines: dict[str, SyntheticEngine] = {}
        self.ranks = 1
        self.deployments: dict[str, str] = {}
        """By engine, where it is not `DEPLOYMENT`."""
        self.unreachable: set[str] = set()
        self.offered: list[Offered] = []
        self.before_apply: Callable[[str], None] = lambda _: None
        self.releases: dict[str, Callable[[str, bytes], bytes]] = {}
        """By replica: how its release writes what goes to it and comes from it, given which and this release's."""

    def add(self, name: str, **options: Any) -> SyntheticEngine:
        engine = SyntheticEngine(CONFIGURED, engine_id=f"{name}-1", **options)
        engine.now_s = self.clock_s
        self.engines[name] = engine
        return engine

    def replica_ids(self, app_name: str) -> dict[str, str]:
        assert app_name == "headrace"
        return {
            replica_of(name): f"SERVE_REPLICA::headrace#{self.deployments.get(name, DEPLOYMENT)}#{replica_of(name)}"
            for name in sorted(self.engines)
        }

    async def call_replica(
        self, actor_name: str, method: str, *, rank: int, timeout_s: float = 5.0, **arguments: Any
    ) -> bytes:
        """Nothing but JSON and plain values goes in and out, as through Ray."""
        name = engine_name(actor_name.rpartition("#")[2], rank, self.ranks)
        written = self.releases.get(name, lambda _, text: text)
        if name in self.unreachable:
            raise ReplicaUnavailable(f"replica {actor_name} did not answer {method}")
        assert method == "apply_thresholds"
        self.before_apply(name)
        try:
            offer = read_question(written(method, arguments["offer"]))
        except ValueError as error:  # as `ChannelServer` answers it
            return answer_of(Ack(accepted=False, active_version=-1, reason=str(error), code="invalid"))
        assert isinstance(offer, Apply)
        ack = self.engines[name].active.offer(offer)
        self.offered.append((name, offer.thresholds, ack))
        return written("ack", answer_of(ack))

    def report_to(self, loop: ControlLoop) -> None:
        """What the reachable replicas send before a pass."""
        for name, engine in self.engines.items():
            if name not in self.unreachable:
                entry, written = loop._replicas.get(name), self.releases.get(name, lambda _, text: text)
                report = answer_of(engine.report(entry.tuner.cursor if entry else 0))
                loop.report(self.deployments.get(name, DEPLOYMENT), {name: written("telemetry", report)})

    def traffic(self, *, every_s: float = 0.25, seconds: float = 60.0, lengths: Any = STEADY) -> None:
        """The same requests to every replica; all clocks move."""
        for engine in self.engines.values():
            engine.traffic(lengths, every_s=every_s, seconds=seconds)
        self.clock_s += seconds

    def active(self, name: str) -> Thresholds:
        return self.engines[name].active.current().thresholds

    def operator(self, name: str, **changes: Any) -> None:
        now = self.active(name)
        ack = self.engines[name].active.offer(
            Apply(thresholds=replace(now, version=now.version + 1, valid_for_s=None, **changes), automatic=False)
        )
        assert ack.accepted


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr(served, "replica_ids", cluster.replica_ids)
    monkeypatch.setattr(questions, "call_replica", cluster.call_replica)
    passes = ControlLoop.one_cycle

    async def with_reports(loop: ControlLoop) -> None:
        cluster.report_to(loop)
        await passes(loop)

    monkeypatch.setattr(ControlLoop, "one_cycle", with_reports)
    clock = SimpleNamespace(monotonic=lambda: cluster.clock_s, time=lambda: 1.7e9 + cluster.clock_s)
    monkeypatch.setattr(controller_module, "time", clock)
    return cluster


def tuned(
    config: ControllerConfig = CONFIG, targets: Slo = NO_SLO, thresholds: Thresholds = CONFIGURED, ranks: int = 1,
    model_id: str = "m",
) -> TunedModel:
    settings = ModelSettings(controller=config, targets=targets, thresholds=thresholds)
    return TunedModel(ServedModel(model_id, ranks), settings)


def new_loop(store: FakeStore | None = None, **settings: Any) -> ControlLoop:
    return ControlLoop("headrace", {DEPLOYMENT: tuned(**settings)}, store or FakeStore())


def one_cycle(loop: ControlLoop) -> None:
    asyncio.run(loop.one_cycle())


def decision(loop: ControlLoop, name: str) -> str:
    return loop.state()["replicas"][name]["decision"]  # type: ignore[no-any-return]


def test_a_replica_is_left_alone_until_enough_is_known(cluster: Cluster) -> None:
    cluster.add("a")
    loop = new_loop()
    one_cycle(loop)
    assert cluster.offered == []
    assert cluster.active("a") == CONFIGURED


def test_it_pushes_once_and_then_settles(cluster: Cluster) -> None:
    cluster.add("a")
    loop = new_loop()
    one_cycle(loop)
    cluster.traffic()
    one_cycle(loop)
    ((_, pushed, ack),) = cluster.offered
    assert ack.accepted
    assert pushed.version == 1
    assert pushed.segments
    assert pushed.valid_for_s == CONFIG.validity_s
    assert cluster.active("a") == pushed

    cluster.traffic(seconds=CONFIG.period_s)
    one_cycle(loop)
    assert len(cluster.offered) == 1
    assert decision(loop, "a") == "settled"
    assert loop.passes == 3


def test_every_replica_is_tuned_for_its_own_traffic(cluster: Cluster) -> None:
    limits = replace(LIMITS, max_num_seqs=4096)
    cluster.add("a", limits=limits).traffic([(58, 147)], every_s=0.125, seconds=60)
    cluster.add("b", limits=limits).traffic([(100, 300)], every_s=0.125, seconds=60)
    one_cycle(new_loop())
    a, b = cluster.active("a"), cluster.active("b")
    assert a.version == b.version == 1
    assert a.segments[-1].end_output_tokens < b.segments[-1].end_output_tokens
    assert a.max_running is not None
    assert b.max_running is not None
    assert a.max_running > b.max_running


def test_every_rank_of_a_replica_is_tuned_by_itself_and_a_silent_one_stops_no_other(cluster: Cluster) -> None:
    limits = replace(LIMITS, max_num_seqs=4096)
    cluster.ranks = 2
    cluster.add("a#0", limits=limits).traffic([(58, 147)], every_s=0.125, seconds=60)
    cluster.add("a#1", limits=limits).traffic([(100, 300)], every_s=0.125, seconds=60)
    cluster.add("b#0")
    cluster.add("b#1")
    cluster.unreachable = {"b#0"}
    loop = new_loop(ranks=2)
    one_cycle(loop)
    first, second = cluster.active("a#0"), cluster.active("a#1")
    assert first.version == second.version == 1
    assert first.max_running > second.max_running
    assert loop.state()["replicas"].keys() == {"a#0", "a#1", "b#0", "b#1"}
    assert "no report yet" in decision(loop, "b#0") and "no report" not in decision(loop, "b#1")

    cluster.operator("a#1", pinned=True, max_running=3)  # one rank only
    cluster.traffic(lengths=[(58, 20)], every_s=0.125, seconds=600)
    one_cycle(loop)
    assert cluster.active("a#1").max_running == 3
    assert cluster.active("a#0").version == 2


def test_a_material_change_of_traffic_is_followed(cluster: Cluster) -> None:
    cluster.add("a")
    loop = new_loop()
    cluster.traffic()
    one_cycle(loop)
    cluster.traffic(lengths=[(58, 147)], every_s=0.5, seconds=1200)  # more than the lengths that are kept
    one_cycle(loop)
    versions = [pushed.version for _, pushed, _ in cluster.offered]
    assert versions == [1, 2]
    ends = [pushed.segments[-1].end_output_tokens for _, pushed, _ in cluster.offered]
    assert ends[0] >= 300 > ends[1] >= 147


def test_a_pin_stops_tuning_and_auto_resumes_it(cluster: Cluster) -> None:
    cluster.add("a")
    loop = new_loop()
    cluster.operator("a", pinned=True, max_running=3)
    cluster.traffic()
    one_cycle(loop)
    assert cluster.offered == []
    assert decision(loop, "a") == "pinned by an operator at version 1"
    assert cluster.active("a").max_running == 3

    cluster.operator("a", pinned=False)
    one_cycle(loop)
    ((_, pushed, ack),) = cluster.offered
    assert ack.accepted
    assert pushed.version == 3
    assert pushed.max_running != 3


def test_a_pin_set_between_telemetry_and_push_is_respected_and_recorded(cluster: Cluster) -> None:
    cluster.add("a")
    loop = new_loop()
    cluster.traffic()
    cluster.before_apply = lambda name: cluster.operator(name, pinned=True)
    one_cycle(loop)
    (event,) = loop.events
    assert not event.accepted
    assert event.reason.startswith("rejected: ")
    assert "version" in event.reason
    assert cluster.active("a").pinned
    assert cluster.active("a").segments == ()


def test_a_rejected_push_is_offered_again_on_top_of_the_active_thresholds(cluster: Cluster) -> None:
    cluster.add("a")
    loop = new_loop()
    cluster.traffic()
    cluster.before_apply = lambda name: cluster.operator(name, max_hold_s=0.5)  # a change that overtakes the push
    one_cycle(loop)
    assert [ack.code for _, _, ack in cluster.offered] == ["stale"]
    cluster.before_apply = lambda _: None
    one_cycle(loop)
    assert cluster.offered[-1][2].accepted
    assert cluster.active("a").version == 2


def test_an_unreachable_replica_does_not_stop_the_others(cluster: Cluster) -> None:
    cluster.add("a")
    cluster.add("b")
    cluster.traffic()
    cluster.unreachable = {"a"}
    loop = new_loop()
    one_cycle(loop)
    assert [name for name, _, _ in cluster.offered] == ["b"]
    assert decision(loop, "a") == "no report yet: the replica is starting"

    cluster.unreachable = set()
    one_cycle(loop)
    assert [name for name, _, _ in cluster.offered] == ["b", "a"]


def test_a_replica_whose_model_fails_does_not_stop_the_others(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One record that cannot be: the replica's note says so, the others are tuned, and it is again after the record."""
    poisoned = cluster.add("a")
    for name in "bc":
        cluster.add(name)
    loop = new_loop()
    cluster.traffic()
    poisoned.iterate(0, 1, 100, 13.0)
    observe = ReplicaModel.observe

    def fails_on_the_record(model: ReplicaModel, telemetry: Telemetry) -> None:
        if any(record.seconds == 13.0 for record in telemetry.iterations):
            raise TypeError("no model can read this")
        observe(model, telemetry)

    monkeypatch.setattr(ReplicaModel, "observe", fails_on_the_record)
    one_cycle(loop)
    assert [name for name, _, _ in cluster.offered] == ["b", "c"]
    assert "TypeError" in decision(loop, "a")
    assert loop.passes == 1

    cluster.traffic()
    one_cycle(loop)
    assert [name for name, _, _ in cluster.offered] == ["b", "c", "a"]
    assert "TypeError" not in decision(loop, "a")


def test_a_solver_that_fails_forgets_nothing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.add("a")
    cluster.traffic()
    loop = new_loop()
    with monkeypatch.context() as failing:
        failing.setattr(ReplicaModel, "propose", lambda model: 1 / 0)
        one_cycle(loop)
        assert "ZeroDivisionError" in decision(loop, "a")
    one_cycle(loop)
    assert cluster.active("a").version == 1


def test_a_failure_in_the_push_is_told_too(cluster: Cluster) -> None:
    cluster.add("a")
    cluster.add("b")
    cluster.traffic()

    def fails(name: str) -> None:
        if name == "a":
            raise KeyError("of another version")

    cluster.before_apply = fails
    loop = new_loop()
    one_cycle(loop)
    assert [name for name, _, _ in cluster.offered] == ["b"]
    assert "of another version" in decision(loop, "a")


def of_schema(version: int) -> Callable[[str, bytes], bytes]:
    """A release that answers in another schema version."""
    return lambda _, text: json.dumps(json.loads(text) | {"schema": version}).encode()


def with_key(method: str, *path: str) -> Callable[[str, bytes], bytes]:
    """A release for which messages of a method have one key more, in the object at `path`."""

    def written(which: str, text: bytes) -> bytes:
        if which != method:
            return text
        message = there = json.loads(text)
        for key in path:
            there = there[key]
        there["of_a_later_release"] = 1
        return json.dumps(message).encode()

    return written


@pytest.mark.parametrize("version", [SCHEMA - 1, SCHEMA + 1])
def test_a_replica_of_another_schema_version_is_not_tuned_and_stops_no_other(
    cluster: Cluster, version: int, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "ab":
        cluster.add(name)
    cluster.releases["a"] = of_schema(version)
    cluster.traffic()
    loop = new_loop()
    for _ in range(3):
        one_cycle(loop)
    assert [name for name, _, _ in cluster.offered] == ["b"]
    assert decision(loop, "a") == (
        f"not tuned: the replica speaks schema version {version}, this process version {SCHEMA}; "
        "both must run the same release"
    )
    assert cluster.active("a") == CONFIGURED
    assert len([record for record in caplog.records if "not tuned" in record.getMessage()]) == 1, "logged once"

    cluster.releases.clear()  # the upgrade is complete
    one_cycle(loop)
    assert cluster.active("a").version == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [("telemetry", ()), ("telemetry", ("thresholds",)), ("telemetry", ("gauges",)), ("ack", ())],
)
def test_a_newer_replica_of_the_same_schema_version_is_tuned(
    cluster: Cluster, method: str, path: tuple[str, ...]
) -> None:
    cluster.add("a")
    cluster.releases["a"] = with_key(method, *path)
    cluster.traffic()
    loop = new_loop()
    one_cycle(loop)
    assert cluster.active("a").version == 1
    one_cycle(loop)
    assert decision(loop, "a") == "settled"


def test_an_older_replica_rejects_a_field_that_it_does_not_know_and_says_which(cluster: Cluster) -> None:
    cluster.add("a")
    cluster.releases["a"] = with_key("apply_thresholds", "apply")
    cluster.traffic()
    loop = new_loop()
    one_cycle(loop)
    assert cluster.active("a") == CONFIGURED
    assert decision(loop, "a").startswith("rejected: thresholds.of_a_later_release = 1 is not allowed")


def test_the_actor_tells_events_apart_from_its_state(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "ClusterStore", lambda app_name: FakeStore())
    cluster.add("a")
    cluster.traffic()
    actor = ControllerActor("headrace", {DEPLOYMENT: tuned()})
    one_cycle(actor._loop)
    answer, state = asyncio.run(actor.events()), asyncio.run(actor.state())
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    (event,) = answer["events"]
    assert (event["replica"], event["old_version"], event["new_version"]) == ("a", 0, 1)
    assert parse_thresholds(event["new"]) == cluster.active("a")
    assert state.keys() == {"started_unix_s", "passes", "period_s", "pins", "scaling", "replicas"}


def test_while_a_pass_solves_the_state_can_be_read(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.add("a")
    cluster.add("b")
    cluster.traffic()
    loop, propose, begun, read = new_loop(), ReplicaModel.propose, threading.Event(), threading.Event()
    threads: list[str] = []

    def slow(model: ReplicaModel) -> Proposal:
        begun.set()
        assert read.wait(5.0), "the event loop was held up"
        return propose(model)

    def listed(app_name: str) -> dict[str, str]:
        threads.append(threading.current_thread().name)
        return cluster.replica_ids(app_name)

    monkeypatch.setattr(ReplicaModel, "propose", slow)
    monkeypatch.setattr(served, "replica_ids", listed)

    async def main() -> dict[str, Any]:
        running = asyncio.create_task(loop.one_cycle())
        while not begun.is_set():
            await asyncio.sleep(0)
        state = loop.state()
        read.set()
        await running
        return state

    during = asyncio.run(main())
    assert during["replicas"]["a"]["fluid"] is None
    assert [name for name, _, _ in cluster.offered] == ["a", "b"]
    assert threads != [threading.main_thread().name]


def test_a_vanished_replica_is_forgotten_and_a_new_one_is_taken_in(cluster: Cluster) -> None:
    cluster.add("a")
    loop = new_loop()
    cluster.traffic()
    one_cycle(loop)
    del cluster.engines["a"]
    cluster.add("b")
    one_cycle(loop)
    assert loop.state()["replicas"].keys() == {"b"}
    cluster.traffic()
    one_cycle(loop)
    assert cluster.active("b").version == 1


def test_an_application_without_replicas_is_no_error(cluster: Cluster) -> None:
    loop = new_loop()
    one_cycle(loop)
    assert loop.state()["replicas"] == {}
    assert loop.passes == 1


def test_thresholds_are_renewed_before_they_lapse_with_the_active_values(cluster: Cluster) -> None:
    engine = cluster.add("a")
    loop = new_loop()
    cluster.traffic()
    one_cycle(loop)
    first = cluster.active("a")
    for _ in range(60):  # five minutes of passes, over which the rate grows by 3 %
        cluster.traffic(every_s=0.2425, seconds=CONFIG.period_s)
        one_cycle(loop)
        current = engine.active.current()
        assert not current.from_config
        assert current.thresholds.same_rule(first)
        assert current.thresholds.reason == first.reason
    renewals = [pushed.version for _, pushed, _ in cluster.offered[1:]]
    assert renewals == list(range(2, 2 + len(renewals)))
    assert 3 <= len(renewals) <= 5  # every half validity, not every pass
    assert len(loop.events) == 1  # a renewal is no change


def test_without_the_controller_they_lapse_to_the_configured_ones(cluster: Cluster) -> None:
    engine = cluster.add("a")
    cluster.traffic()
    one_cycle(new_loop())
    engine.now_s += CONFIG.validity_s - 1
    assert not engine.active.current().from_config
    engine.now_s += 1
    assert engine.active.current().from_config
    assert engine.active.current().thresholds.same_rule(CONFIGURED)


def test_a_window_without_arrivals_returns_to_the_configured_ones_and_says_why(cluster: Cluster) -> None:
    engine = cluster.add("a")
    loop = new_loop()
    cluster.traffic()
    one_cycle(loop)
    engine.now_s += CONFIG.window_s + 1
    cluster.clock_s += CONFIG.window_s + 1
    one_cycle(loop)
    assert cluster.active("a").same_rule(CONFIGURED)
    assert "no arrivals in the last 60 s" in loop.events[-1].reason
    assert "no arrivals in the last 60 s" in cluster.active("a").reason


def test_events_tell_what_changed_and_why(cluster: Cluster) -> None:
    cluster.add("a")
    loop = new_loop()
    cluster.traffic()
    one_cycle(loop)
    (event,) = loop.events
    assert (event.replica, event.old_version, event.new_version, event.accepted) == ("a", 0, 1, True)
    assert parse_thresholds(event.old) == CONFIGURED
    assert parse_thresholds(event.new) == cluster.active("a")
    assert "requests/s, load" in event.reason
    assert event.reason == cluster.active("a").reason
    assert event.at_unix_s == 1.7e9 + cluster.clock_s


def test_a_new_controller_goes_on_from_the_active_thresholds(cluster: Cluster) -> None:
    cluster.add("a")
    cluster.traffic()
    one_cycle(new_loop())
    cluster.operator("a", max_hold_s=0.25)
    before = cluster.active("a")
    restarted = new_loop()
    one_cycle(restarted)
    after = cluster.active("a")
    assert after.same_rule(before)
    assert before.version <= after.version <= before.version + 1
    assert all(ack.accepted for _, _, ack in cluster.offered)
    assert list(restarted.events) == []  # no visible change


def test_a_restarted_engine_is_tuned_again(cluster: Cluster) -> None:
    cluster.add("a")
    loop = new_loop()
    cluster.traffic()
    one_cycle(loop)
    engine = SyntheticEngine(CONFIGURED, engine_id="a-2")
    cluster.engines["a"] = engine
    one_cycle(loop)
    cluster.traffic()
    one_cycle(loop)
    assert cluster.active("a").version >= 1
    assert cluster.active("a").segments


@pytest.mark.parametrize("every_s", [0.25, 1 / 128], ids=["feasible", "overload"])
def test_state_is_plain_json(cluster: Cluster, every_s: float) -> None:
    cluster.add("a", limits=replace(LIMITS, kv_capacity_tokens=6000))
    cluster.add("b")
    cluster.add("c")
    cluster.unreachable = {"c"}
    loop = new_loop()
    one_cycle(loop)
    cluster.traffic(every_s=every_s)
    one_cycle(loop)
    state = loop.state()
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    assert state["passes"] == 2
    assert state["replicas"]["a"]["fluid"]["fits_memory"] is (every_s == 0.25)
    assert state["replicas"]["a"]["rate_rps"] == pytest.approx(1 / every_s, rel=0.01)
    assert state["replicas"]["a"]["time_model"]["d0_s"] == PAPER.d0_s
    assert state["replicas"]["c"]["fluid"] is None


def test_state_says_what_binds_and_what_is_expected_to_be_good(cluster: Cluster) -> None:
    cluster.add("a")
    targets = Slo(ttft_s=3.0, tpot_s=0.1)
    loop = new_loop(targets=targets, thresholds=Thresholds(policy="fluid"))
    one_cycle(loop)
    cluster.traffic(every_s=0.25)
    one_cycle(loop)
    state = loop.state()
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    assert "events" not in state
    forecast = state["replicas"]["a"]["forecast"]
    assert forecast["bottleneck"] in ("memory", "TPOT target", "TTFT target", "nothing")
    assert 0 < forecast["goodput_rps"] <= forecast["capacity_rps"]
    assert forecast["rate_rps"]["low"] <= 4 <= forecast["rate_rps"]["high"]
    event = loop.events[-1]
    assert event.old != event.new and forecast["bottleneck"] in event.reason


def test_the_list_of_events_is_bounded(cluster: Cluster) -> None:
    engine = cluster.add("a")
    loop = new_loop()
    cluster.traffic()
    for number in range(300):
        one_cycle(loop)
        now = cluster.active("a")
        other = replace(
            now, version=now.version + 1, segments=(SegmentThreshold(end_output_tokens=number + 1, total=1),)
        )
        assert engine.active.offer(Apply(thresholds=other, automatic=False)).accepted
    assert len(loop.events) == 200
    assert loop.events[-1].new_version == 599


def test_a_lost_controller_is_looked_for_within_its_period() -> None:
    fast, off = CONFIG.model_copy(update={"period_s": 0.01}), ControllerConfig(enabled=False, period_s=0.01)
    assert ControllerKeeper({"a": tuned(), "b": tuned(off)}).check_every_s == CONFIG.period_s / 2
    assert ControllerKeeper({"a": tuned(), "b": tuned(fast)}).check_every_s == 0.5


def test_each_model_s_replicas_are_tuned_with_its_own_settings_at_its_own_period(cluster: Cluster) -> None:
    cluster.add("a")
    cluster.add("b")
    cluster.add("c")
    cluster.deployments = {"b": "HeadraceServer:n", "c": "HeadraceServer:off"}
    slower = CONFIG.model_copy(update={"validity_s": 60.0, "period_s": 2 * CONFIG.period_s})
    loop = ControlLoop("headrace", {
        DEPLOYMENT: tuned(targets=Slo(ttft_s=3.0)),
        "HeadraceServer:n": tuned(slower, Slo(ttft_s=9.0), model_id="n"),
        "HeadraceServer:off": tuned(ControllerConfig(enabled=False)),
    }, FakeStore())
    assert loop.period_s == CONFIG.period_s
    cluster.traffic()
    one_cycle(loop)
    shown = loop.state()["replicas"]
    assert {name: entry["targets"]["ttft_s"] for name, entry in shown.items()} == {"a": 3.0, "b": 9.0}, "c is not tuned"
    assert {event.replica: event.model for event in loop.events} == {"a": "m", "b": "n"}
    assert [cluster.active(name).valid_for_s for name in "abc"] == [CONFIG.validity_s, 60.0, None]

    before = loop._replicas["b"].due_s
    loop.report("HeadraceServer:n", {"b": answer_of(cluster.engines["b"].report(0))}, urgent=True)
    assert loop._replicas["b"].due_s < before, "as after a change of its settings"
    loop._replicas["b"].due_s = before
    asked = {name: loop._replicas[name].due_s for name in "ab"}
    cluster.clock_s += CONFIG.period_s
    one_cycle(loop)
    assert [loop._replicas[name].due_s > asked[name] for name in "ab"] == [True, False], "n is not due yet"
    cluster.clock_s += CONFIG.period_s
    one_cycle(loop)
    assert loop._replicas["b"].due_s > asked["b"]
