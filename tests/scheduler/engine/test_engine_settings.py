"""Settings of an engine, what its policy is not supported with, and the channel of a real engine."""

import asyncio

import pytest
from engine_harness import Engine, add_many, nested, wait

from scheduler.engine.channel import ChannelClient, new_endpoint, remove_endpoint
from scheduler.support import UnsupportedSetting
from scheduler.thresholds import InvalidThresholds, Thresholds


def test_engine_does_not_start_with_settings_that_do_not_fit():
    with pytest.raises(InvalidThresholds, match="max_running = 65"):
        Engine(thresholds={"max_running": 65})
    with pytest.raises(InvalidThresholds, match="mode = 'strict'"):
        Engine(thresholds={"mode": "strict"})
    with pytest.raises(ValueError, match=r"headrace\.chanel"):
        Engine(settings={"chanel": "ipc:///tmp/x"})


def test_live_channel_into_a_serving_engine():
    endpoint = new_endpoint()
    engine = Engine(settings={"channel": endpoint, "thresholds": {"policy": "fcfs"}})

    async def main():
        client = ChannelClient(endpoint)
        try:
            assert (await client.report()).from_config
            ack = await client.apply(Thresholds(version=1, max_running=2))
            assert ack.accepted
            add_many(engine, 5, output=4)
            engine.step()
            assert len(engine.running) == 2
            answer = await client.report()
            assert len(answer.arrivals) == 5 and answer.gauges.held == 3 and answer.thresholds.version == 1
            engine.run()
            assert len((await client.report(answer.cursor)).finished) == 5
        finally:
            client.close()

    try:
        asyncio.run(main())
    finally:
        engine.scheduler.shutdown()
        remove_endpoint(endpoint)
    assert not engine.scheduler._channel._thread.is_alive(), "shutdown closes the channel"


# Engine settings that a policy does not go with.

NGRAM = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}, "async_scheduling": False}
CONNECTOR = {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}


@pytest.mark.parametrize(
    ("thresholds", "engine_args", "says"),
    [
        ({"policy": "fluid"}, CONNECTOR, "KV transfer .* is not supported with policy fluid"),
        ({"policy": "fluid"}, {"kv_offloading_size": 1.0}, "KV transfer .* is not supported with policy fluid"),
    ],
    ids=str,
)
def test_an_engine_does_not_start_with_a_setting_that_its_policy_does_not_go_with(thresholds, engine_args, says):
    settings = {"profile": "a100-llama2-7b", "targets": {"ttft_s": 2.0, "tpot_s": 0.05}}
    with pytest.raises(UnsupportedSetting, match=says):
        Engine(thresholds=thresholds, settings=settings, **engine_args)


@pytest.mark.parametrize(
    ("thresholds", "engine_args"),
    [
        ({"policy": "fluid"}, NGRAM), (nested((8, 2), (64, 1)), NGRAM), ({"policy": "fcfs"}, CONNECTOR),
        ({"policy": "fluid"}, {"pipeline_parallel_size": 2}),
    ],
    ids=str,
)
def test_an_engine_starts_with_a_setting_that_its_policy_goes_with(thresholds, engine_args):
    Engine(thresholds=thresholds, **engine_args)


def test_an_unsupported_policy_is_rejected_live_too():
    engine = Engine(thresholds={"policy": "fcfs"}, **CONNECTOR)
    ack = engine.apply({"policy": "fluid"}, automatic=False)
    assert (ack.accepted, ack.code) == (False, "invalid") and "KV transfer" in ack.reason
    assert engine.apply(wait(2), automatic=False).accepted


def test_a_small_token_budget_starves_no_running_request_with_speculative_decoding():
    engine = Engine(thresholds={"policy": "fcfs"}, **NGRAM)
    names = add_many(engine, 20, prompt=16, output=40)
    engine.launch()
    engine.deliver()
    assert engine.running == names
    assert engine.apply({"policy": "fcfs", "token_budget": 1}).accepted
    for _ in range(10):
        before = {name: engine.requests[name].num_output_tokens for name in names}
        engine.launch()
        engine.deliver()
        assert all(engine.requests[name].num_output_tokens > count for name, count in before.items())
