"""The control channel: a real ZeroMQ server and client in this process."""

import asyncio
import contextlib
import json
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from scheduler.engine import channel
from scheduler.engine.channel import (
    ChannelClient,
    ChannelClosed,
    ChannelServer,
    engine_id,
    new_endpoint,
    remove_endpoint,
)
from scheduler.engine.recorder import Recorder
from scheduler.engine.settings_in_force import SettingsInForce
from scheduler.messages import Ack, Arrival, Counters, Drain, Gauges, Iteration, RunningLengths, Stats, Telemetry
from scheduler.policies import make_policy
from scheduler.settings import LiveSettings, SchedulerSettings
from scheduler.support import EngineSetup
from scheduler.thresholds import EngineLimits, SegmentThreshold, Thresholds, TypeThreshold
from scheduler.tuning.slo import Slo
from scheduler.wire import (
    SCHEMA,
    OtherSchema,
    QuestionFailed,
    drain_question,
    offer_of,
    read_answer,
    settings_question,
    stats_question,
)

LIMITS = EngineLimits(
    kv_capacity_tokens=1600, block_tokens=16, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=1024
)
WAIT = Thresholds(
    version=3, policy="wait", types=(TypeThreshold(name="short", n=4, max_output_tokens=50),),
    segments=(SegmentThreshold(end_output_tokens=8, total=2),), max_running=32, max_hold_s=0.5, reason="λ = 2/s",
)


@pytest.fixture
def endpoint():
    endpoint = new_endpoint()
    yield endpoint
    remove_endpoint(endpoint)


class FakeEngine:
    """What the server asks: thresholds judged by the real rules, telemetry from a real recorder."""

    def __init__(self):
        self.in_force = SettingsInForce(SchedulerSettings(), LIMITS, lambda: 0.0, EngineSetup(), make_policy)
        self.active = self.in_force.active
        self.recorder = Recorder()
        self.reports = []
        self.fails = False
        self.drained = []

    def drain(self, order):
        if self.fails:
            raise RuntimeError("broken drain")
        self.drained.append(order)
        return Ack(accepted=True, active_version=-1)

    def report(self, asked):
        if self.fails:
            raise RuntimeError("broken telemetry")
        self.reports.append(asked.cursor)
        iterations, arrivals, finished, lost = self.recorder.since(asked.cursor)
        return Telemetry(
            engine_id="e", clock_s=1.5, cursor=self.recorder.cursor, limits=LIMITS,
            thresholds=self.active.current().thresholds, from_config=self.active.current().from_config,
            gauges=Gauges(running=2, kv_used_tokens=64), counters=Counters(arrivals=1, hold_s=0.25),
            iterations=iterations, arrivals=arrivals, finished=finished, running=(RunningLengths(32, 5),),
            records_lost=int(lost),
        )

    def stats(self):
        if self.fails:
            raise RuntimeError("broken stats")
        return Stats.of_engine("e", LIMITS, self.active.current().thresholds, Gauges(running=2, kv_used_tokens=64))


@contextlib.contextmanager
def serving(endpoint, engine=None):
    engine = engine or FakeEngine()
    server = ChannelServer(
        endpoint, engine.active.offer, engine.report, engine.stats, engine.in_force.configure, engine.drain
    )
    try:
        yield engine
    finally:
        server.close()


@contextlib.asynccontextmanager
async def asking(endpoint):
    client = ChannelClient(endpoint)
    try:
        yield client
    finally:
        client.close()


@contextlib.asynccontextmanager
async def raw_socket(endpoint):
    """A peer that speaks ZeroMQ and not our protocol."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(endpoint)
    try:
        yield socket
    finally:
        socket.close()
        context.destroy(linger=0)


async def answer_to(endpoint, question):
    async with raw_socket(endpoint) as socket:
        await socket.send_multipart([b"7", question])
        question_id, answer = await asyncio.wait_for(socket.recv_multipart(), 10)
        assert question_id == b"7"
        return json.loads(answer)


def test_thresholds_survive_the_round_trip_and_are_acknowledged(endpoint):
    async def main():
        async with asking(endpoint) as client:
            ack = await client.apply(WAIT)
            assert ack.accepted and ack.active_version == 3 and ack.reason == "λ = 2/s"

    with serving(endpoint) as engine:
        asyncio.run(main())
        assert engine.active.current().thresholds == WAIT


def test_older_thresholds_are_rejected_with_the_active_version(endpoint):
    async def main():
        async with asking(endpoint) as client:
            await client.apply(WAIT)
            ack = await client.apply(Thresholds(version=2))
            assert (ack.accepted, ack.active_version, ack.code) == (False, 3, "stale")
            ack = await client.apply(Thresholds(version=4, max_running=65))
            assert (ack.accepted, ack.active_version, ack.code) == (False, 3, "invalid")
            assert "max_running = 65" in ack.reason

    with serving(endpoint) as engine:
        asyncio.run(main())
        assert engine.active.current().thresholds == WAIT


def test_the_automatic_flag_survives_the_round_trip(endpoint):
    async def main():
        async with asking(endpoint) as client:
            await client.apply(Thresholds(version=1, pinned=True), automatic=False)
            assert (await client.apply(Thresholds(version=2), automatic=True)).code == "pinned"
            assert (await client.apply(Thresholds(version=2), automatic=False)).accepted

    with serving(endpoint):
        asyncio.run(main())


def test_telemetry_survives_the_round_trip(endpoint):
    async def main():
        async with asking(endpoint) as client:
            return [await client.report(0), await client.report(1), await client.report(None)]

    with serving(endpoint) as engine:
        engine.recorder.arrival(0.5, 32, None)
        engine.recorder.iteration(1.0, 0.01, 32, 0, 32, 1)
        everything, newer, none = asyncio.run(main())
    assert everything.arrivals == (Arrival(1, 0.5, 32, None),)
    assert everything.iterations == newer.iterations == (Iteration(2, 1.0, 0.01, 32, 0, 32, 1),)
    assert newer.arrivals == () and none.iterations == () and none.arrivals == ()
    assert everything.cursor == 2 and everything.limits == LIMITS and everything.thresholds == Thresholds()
    assert everything.gauges == Gauges(running=2, kv_used_tokens=64)
    assert everything.counters == Counters(arrivals=1, hold_s=0.25) and everything.running == (RunningLengths(32, 5),)


def test_concurrent_questions_get_their_own_answers(endpoint):
    async def main():
        async with asking(endpoint) as client:
            cursors = list(range(20))
            received = await asyncio.gather(*(client.report(cursor) for cursor in cursors))
            return [[arrival.seq for arrival in each.arrivals] for each in received]

    with serving(endpoint) as engine:
        for _ in range(20):
            engine.recorder.arrival(0.0, 1, 1)
        assert asyncio.run(main()) == [list(range(cursor + 1, 21)) for cursor in range(20)]


def test_several_clients_at_once(endpoint):
    async def main():
        async with asking(endpoint) as one, asking(endpoint) as other:
            acks = await asyncio.gather(
                *(client.apply(Thresholds(version=version)) for version in range(1, 11) for client in (one, other))
            )
            accepted = [ack.active_version for ack in acks if ack.accepted]
            assert len(set(accepted)) == len(accepted), "no version is taken twice"
            assert (await one.report()).thresholds.version == (await other.report()).thresholds.version == 10

    with serving(endpoint):
        asyncio.run(main())


@pytest.mark.parametrize(
    ("question", "says"),
    [
        (b"\x00\xff\xfe garbage", "not understood"),
        (b"", "not understood"),
        (b"[1, 2]", "not understood"),
        (b"null", "not understood"),
        (b'{"apply"', "not understood"),
        (b"{}", "unknown question"),
        (b'{"shutdown": true}', "unknown question ['shutdown']; ask one of apply, settings, report, stats"),
        (b'{"report": "x"}', "report = x is not allowed; allowed: a cursor, or null"),
        (b'{"report": [1]}', "report = [1]"),
        (b'{"report": true}', "report = True"),
        (b'{"report": 1e999}', "report = inf"),
        (b'{"schema": 1, "apply": null}', "(body)"),
        (b'{"schema": 1, "apply": {"version": 1, "max_hold_s": -1}}', "max_hold_s = -1"),
        (b'{"schema": 1, "apply": {"version": 1, "nonsense": 1}}', "nonsense"),
        (b'{"schema": 1, "apply": {"version": true}}', "version = True"),
        (b'{"schema": 1, "apply": {"version": 1}, "automatic": "no"}', "automatic = 'no'"),
        (b'{"schema": 1, "apply": {"version": 1}, "dry_run": true}', "unknown key dry_run"),
        (b"[" * 100_000, "not understood"),
        (b'{"schema": 1, "settings": {"targets": {"ttft_s": 1.0}}}', "revision = None is not allowed"),
        (b'{"schema": 1, "settings": {}, "revision": 0}', "revision = 0 is not allowed; allowed: an integer >= 1"),
        (b'{"schema": 1, "settings": {}, "revision": true}', "revision = True"),
        (b'{"schema": 1, "settings": null, "revision": 1}', "settings = None is not allowed; allowed: an object"),
        (b'{"schema": 1, "settings": {"targets": {"ttft_s": -1}}, "revision": 1}', "settings.targets.ttft_s = -1"),
        (b'{"schema": 1, "settings": {"target": {}}, "revision": 1}', "settings.target = {}"),
        (b'{"schema": 1, "settings": {"channel": "x"}, "revision": 1}', "settings.channel = 'x'"),
        (b'{"schema": 1, "settings": {"thresholds": {"policy": "lifo"}}, "revision": 1}', "thresholds.policy = 'lifo'"),
        (b'{"schema": 1, "settings": {"thresholds": {"max_running": 65}}, "revision": 1}', "max_running = 65"),
        (b'{"schema": 1, "settings": {"profile": "no such"}, "revision": 1}', "profile 'no such' is not known"),
        (b'{"schema": 1, "settings": {}, "revision": 1, "dry_run": 1}', "unknown key dry_run beside the settings"),
    ],
    ids=lambda part: str(part[:25]),
)
def test_garbage_is_answered_and_changes_nothing(endpoint, question, says):
    async def main():
        answer = await answer_to(endpoint, question)
        assert answer["accepted"] is False and answer["code"] == "invalid"
        assert says in answer["reason"]
        async with asking(endpoint) as client:
            assert (await client.apply(Thresholds(version=1))).accepted, "and the channel works on"

    with serving(endpoint) as engine:
        asyncio.run(main())
        assert engine.active.current().thresholds == Thresholds(version=1)
        assert engine.in_force.settings == LiveSettings()


def test_settings_survive_the_round_trip(endpoint):
    wanted = LiveSettings(thresholds=Thresholds(max_running=8), targets=Slo(ttft_s=0.7), overflow_probability=0.03)

    async def main():
        async with asking(endpoint) as client:
            ack = read_answer(await client.ask(settings_question(wanted.as_dict(), revision=1)), Ack)
            assert ack.accepted and ack.active_version == 1

    with serving(endpoint) as engine:
        asyncio.run(main())
        assert engine.in_force.settings == wanted
        assert engine.active.current().thresholds == Thresholds(version=1, max_running=8)


def test_messages_of_the_wrong_shape_are_ignored(endpoint):
    async def main():
        async with raw_socket(endpoint) as socket:
            await socket.send_multipart([b"alone"])
            await socket.send_multipart([b"1", b'{"report": 0}', b"surplus"])
            await socket.send_multipart([b"2", b'{"report": 0}'])
            question_id, _ = await asyncio.wait_for(socket.recv_multipart(), 10)
            assert question_id == b"2"

    with serving(endpoint):
        asyncio.run(main())


def test_oversized_question_is_dropped_and_the_channel_works_on(endpoint):
    async def main():
        async with raw_socket(endpoint) as socket, asking(endpoint) as client:
            await socket.send_multipart([b"1", b" " * (1 << 21)])
            assert (await client.apply(Thresholds(version=1))).accepted
            with pytest.raises(ChannelClosed):
                await client.apply(Thresholds(version=2, reason="x" * (1 << 21)), timeout_s=0.2)
            assert (await client.apply(Thresholds(version=2))).accepted, "the same client goes on"

    with serving(endpoint) as engine:
        asyncio.run(main())
        assert engine.active.current().thresholds.version == 2


def test_a_peer_that_asks_and_vanishes_does_no_harm(endpoint):
    async def main():
        for _ in range(20):
            async with raw_socket(endpoint) as socket:
                await socket.send_multipart([b"1", b'{"report": 0}'])
        async with asking(endpoint) as client:
            assert (await client.report()).engine_id == "e"

    with serving(endpoint):
        asyncio.run(main())


def test_half_a_message_does_no_harm(endpoint):
    async def main():
        path = endpoint.removeprefix("ipc://")
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f")  # a ZeroMQ greeting, cut off
        await writer.drain()
        async with asking(endpoint) as client:
            assert (await client.apply(Thresholds(version=1))).accepted
        writer.close()

    with serving(endpoint):
        asyncio.run(main())


def test_twice_delivered_thresholds_are_taken_once(endpoint):
    async def main():
        question = json.dumps({"schema": SCHEMA, "apply": {"version": 5, "policy": "fcfs"}}).encode()
        assert (await answer_to(endpoint, question))["accepted"] is True
        again = await answer_to(endpoint, question)
        assert (again["accepted"], again["code"], again["active_version"]) == (False, "stale", 5)

    with serving(endpoint):
        asyncio.run(main())


def test_late_answer_to_an_earlier_question_is_dropped(endpoint):
    """A server that answers every question twice, first under another id."""

    async def main():
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.ROUTER)
        socket.bind(endpoint)
        engine = FakeEngine()
        server = ChannelServer.__new__(ChannelServer)  # only its answers, not its socket
        server._apply, server._report = engine.active.offer, engine.report

        async def answer_twice():
            for _ in range(2):
                sender, question_id, question = await socket.recv_multipart()
                await socket.send_multipart([sender, b"0", b"an answer that came too late"])
                await socket.send_multipart([sender, question_id, server._answer(question)])

        answering = asyncio.create_task(answer_twice())
        async with asking(endpoint) as client:
            assert (await client.apply(WAIT)).active_version == 3
            assert (await client.report()).thresholds == WAIT
        await answering
        socket.close(linger=0)
        context.destroy(linger=0)

    asyncio.run(main())


def test_stats_are_a_few_numbers(endpoint):
    async def main():
        async with asking(endpoint) as client:
            await client.apply(Thresholds(version=7, max_running=12))
            return await client.ask(stats_question())

    with serving(endpoint) as engine:
        engine.recorder.arrival(0.0, 1, 1)
        answer = asyncio.run(main())
    assert read_answer(answer, Stats) == Stats(
        engine_id="e", slots=12, running=2, waiting=0, kv_used_tokens=64, kv_capacity_tokens=1600, thresholds_version=7
    )
    assert len(answer) < 300 and engine.reports == []


def test_failing_stats_say_why_and_the_channel_works_on(endpoint):
    async def main():
        async with asking(endpoint) as client:
            with pytest.raises(QuestionFailed, match="broken stats"):
                read_answer(await client.ask(stats_question()), Stats)
            engine.fails = False
            assert read_answer(await client.ask(stats_question()), Stats).engine_id == "e"

    engine = FakeEngine()
    engine.fails = True
    with serving(endpoint, engine):
        asyncio.run(main())


@pytest.mark.parametrize("schema", [SCHEMA + 1, SCHEMA - 1, None, "1"])
def test_thresholds_of_another_schema_version_change_nothing_and_say_so(endpoint, schema):
    async def main():
        question = json.loads(offer_of(WAIT, automatic=True)) | {"schema": schema}
        return await answer_to(endpoint, json.dumps(question).encode())

    with serving(endpoint) as engine:
        answer = asyncio.run(main())
        assert engine.active.current().thresholds == Thresholds()
    assert (answer["accepted"], answer["code"], answer["schema"]) == (False, "schema", SCHEMA)
    spoken = "no schema version" if schema is None else f"schema version {schema}"
    assert f"speaks {spoken}, this process version {SCHEMA}" in answer["reason"]


@pytest.mark.parametrize("question", [{"report": None}, {"stats": True}])
def test_questions_that_change_nothing_are_answered_in_the_engine_s_own_schema_version(endpoint, question):
    async def main():
        return await answer_to(endpoint, json.dumps({"schema": SCHEMA + 1, "later": 1} | question).encode())

    with serving(endpoint):
        answer = asyncio.run(main())
    assert answer["schema"] == SCHEMA and answer["engine_id"] == "e"


def test_a_client_of_another_schema_version_reads_nothing(endpoint, monkeypatch):
    async def main():
        async with asking(endpoint) as client:
            with pytest.raises(OtherSchema, match="the replica speaks schema version 2, this process version 1"):
                await client.report()
            with pytest.raises(OtherSchema):
                await client.apply(WAIT)

    with serving(endpoint) as engine:
        answer = ChannelServer._answer
        later = lambda server, question: answer(server, question).replace(b'{"schema":1', b'{"schema":2')  # noqa: E731
        monkeypatch.setattr(ChannelServer, "_answer", later)
        asyncio.run(main())
        assert engine.active.current().thresholds == WAIT, "only the reader is of another version here"


def test_failing_telemetry_is_a_closed_channel_and_not_its_end(endpoint):
    async def main():
        async with asking(endpoint) as client:
            with pytest.raises(ChannelClosed, match="broken telemetry"):
                await client.report()
            engine.fails = False
            assert (await client.report()).engine_id == "e"

    engine = FakeEngine()
    engine.fails = True
    with serving(endpoint, engine):
        asyncio.run(main())


def test_a_channel_without_a_server_is_closed_until_one_listens(endpoint):
    async def main():
        async with asking(endpoint) as client:
            with pytest.raises(ChannelClosed, match="did not answer at ipc://.* within 0.05 s"):
                await client.report(timeout_s=0.05)
            with pytest.raises(ChannelClosed):
                await client.apply(WAIT, timeout_s=0.05)
            with serving(endpoint) as engine:
                assert (await client.report()).engine_id == "e"
                assert (await client.apply(WAIT)).accepted
                assert engine.reports == [0], "what timed out is not delivered late"
            with pytest.raises(ChannelClosed):
                await client.report(timeout_s=0.05)
            with serving(endpoint) as restarted:
                assert (await client.report()).from_config, "a new life of the engine"
                assert restarted.active.current().thresholds == Thresholds()

    asyncio.run(main())


def test_time_out_counts_while_others_ask(endpoint):
    async def main():
        async with asking(endpoint) as client:
            patient = asyncio.create_task(client.report(timeout_s=60))
            await asyncio.sleep(0)  # it asks first; no server listens yet
            with pytest.raises(ChannelClosed):
                await asyncio.wait_for(client.report(timeout_s=0.05), 10)
            with serving(endpoint):
                assert (await patient).engine_id == "e", "the other one's time-out left it alone"

    asyncio.run(main())


def test_asking_on_after_closing_is_a_closed_channel(endpoint):
    async def main():
        client = ChannelClient(endpoint)
        client.close()
        client.close()
        with pytest.raises(ChannelClosed):
            await client.report(timeout_s=0.05)

    with serving(endpoint):
        asyncio.run(main())


def test_cancelled_question_leaves_the_client_usable(endpoint):
    async def main():
        async with asking(endpoint) as client:
            asked = asyncio.create_task(client.report(timeout_s=60))
            await asyncio.sleep(0)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            with serving(endpoint):
                assert (await client.report()).engine_id == "e"

    asyncio.run(main())


def test_endpoint_is_private_and_leaves_nothing_behind():
    endpoint = new_endpoint()
    folder = Path(endpoint.removeprefix("ipc://")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    another = new_endpoint()
    assert another != endpoint
    remove_endpoint(another)
    with serving(endpoint):
        assert Path(endpoint.removeprefix("ipc://")).is_socket()
    remove_endpoint(endpoint)
    assert not folder.exists()
    remove_endpoint(endpoint)  # twice is fine


def test_endpoint_that_cannot_be_bound_is_named():
    with pytest.raises(RuntimeError, match="cannot open the control channel at ipc:///nowhere/engine"):
        ChannelServer("ipc:///nowhere/engine", *[lambda *_: None] * 5)


def test_a_drain_reaches_the_engine_and_is_acknowledged(endpoint):
    async def main():
        async with asking(endpoint) as client:
            acks = [read_answer(await client.ask(drain_question(end=end)), Ack) for end in (False, False, True)]
            engine.fails = True
            failed = read_answer(await client.ask(drain_question(end=True)), Ack)
        assert all(ack.accepted for ack in acks) and not failed.accepted

    with serving(endpoint) as engine:
        asyncio.run(main())
    assert engine.drained == [Drain(end=False), Drain(end=False), Drain(end=True)]


def test_closing_frees_the_endpoint_for_the_next(endpoint):
    async def main():
        async with asking(endpoint) as client:
            assert (await client.report()).engine_id == "e"

    for _ in range(3):
        with serving(endpoint):
            asyncio.run(main())


def test_every_life_of_an_engine_has_its_own_name():
    assert engine_id() != engine_id()


@pytest.fixture
def temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_replicas_that_start_together_all_get_an_endpoint_and_sweep_once(temporary_files):
    stale = [temporary_files / f"{channel.FOLDER}-{4_000_000 + number}-x{number}" for number in range(300)]
    for folder in stale:
        folder.mkdir()
        (folder / "engine").touch()
    with ThreadPoolExecutor(8) as starting:
        endpoints = list(starting.map(lambda _: new_endpoint(), range(8)))
    assert len(set(endpoints)) == 8 and not any(folder.exists() for folder in stale)
    assert all(Path(endpoint.removeprefix("ipc://")).parent.is_dir() for endpoint in endpoints)
    for endpoint in endpoints:
        remove_endpoint(endpoint)
    assert not list(temporary_files.iterdir())


ANOTHER_REPLICA = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from scheduler.engine.channel import ChannelServer, new_endpoint
endpoint = new_endpoint()
server = ChannelServer(endpoint, None, None, None, None, None)
print(endpoint, flush=True)
sys.stdin.read()
"""


def test_a_living_neighbour_keeps_its_socket_and_a_killed_one_is_swept(temporary_files, monkeypatch):
    """Its process id does not matter: the neighbour may count processes in a namespace of its own."""
    monkeypatch.setattr("psutil.pid_exists", lambda pid: False)
    command = [sys.executable, "-c", ANOTHER_REPLICA, str(temporary_files)]
    root = Path(channel.__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as neighbour:
        socket = Path(neighbour.stdout.readline().strip().removeprefix("ipc://"))
        remove_endpoint(new_endpoint())
        assert socket.is_socket()
        neighbour.kill()
        neighbour.wait()
        remove_endpoint(new_endpoint())
        assert not socket.parent.exists()
