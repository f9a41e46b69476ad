"""The parts of Ray that are not public and that Headrace stands on: when an upgrade moves one, this says which."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import inspect
import pickle
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from replicas.delivery import Deliveries, noting
from replicas.marks import LatestMarks, Marks
from replicas.prompt_blocks import blocks_in
from replicas.routing_stats import RoutingStats
from scheduler.engine.active_thresholds import ActiveThresholds
from scheduler.engine.channel import (
    ChannelClient,
    ChannelClosed,
    ChannelServer,
    new_endpoint,
    rank_endpoint,
    remove_endpoint,
)
from scheduler.messages import Ack, Counters, Delivered, Gauges, Stats, Telemetry
from scheduler.thresholds import EngineLimits, Thresholds
from scheduler.wire import QuestionFailed, answer_of, offer_of, read_answer, read_question

ray = pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("vllm", reason="vLLM is not installed")

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
LIMITS = EngineLimits(
    kv_capacity_tokens=1000, block_tokens=16, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=512
)
OPENAI_MODELS = "ray.llm._internal.serve.core.configs.openai_api_models"


def name_in(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def test_ray_is_the_version_this_was_verified_with() -> None:
    assert ray.__version__.split(".")[:2] == ["2", "60"]


# replicas/actor_calls.py


def test_request_metadata_names_the_method_to_call() -> None:
    metadata_type = name_in("ray.serve._private.common", "RequestMetadata")
    fields = {field.name: field for field in dataclasses.fields(metadata_type)}
    required = [
        name for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    assert required == ["request_id", "internal_request_id"]
    assert fields["call_method"].default == "__call__"
    metadata = metadata_type(request_id="r", internal_request_id="r", call_method="telemetry")
    assert pickle.loads(pickle.dumps(metadata)).call_method == "telemetry"
    assert not metadata.is_streaming
    assert not metadata.is_http_request


def test_replica_actors_live_in_the_namespace_of_serve() -> None:
    assert name_in("ray.serve._private.constants", "SERVE_NAMESPACE") == "serve"


def test_a_replica_id_survives_its_actor_name() -> None:
    replica_id = name_in("ray.serve.request_router", "ReplicaID")
    deployment_id = name_in("ray.serve._private.common", "DeploymentID")
    replica = replica_id("abc123", deployment_id(name="HeadraceServer:my-model", app_name="headrace"))
    actor_name = replica.to_full_id_str()
    assert replica_id.is_full_id_str(actor_name)
    assert replica_id.from_full_id_str(actor_name) == replica
    assert replica_id.from_full_id_str(actor_name).deployment_id.app_name == "headrace"
    assert not replica_id.is_full_id_str("controller:headrace")
    assert not replica_id.is_full_id_str("SERVE_CONTROLLER_ACTOR")


def test_replicas_are_found_by_their_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    from replicas.actor_calls import replica_ids

    replica_id = name_in("ray.serve.request_router", "ReplicaID")
    deployment_id = name_in("ray.serve._private.common", "DeploymentID")

    def actor(app: str, deployment: str, unique: str, namespace: str = "serve") -> dict[str, str]:
        name = replica_id(unique, deployment_id(name=deployment, app_name=app)).to_full_id_str()
        return {"name": name, "namespace": namespace}

    ours = [actor("headrace", "HeadraceServer:m", unique) for unique in ("zz", "aa")]
    others = [
        actor("headrace", "HeadraceIngress", "ingress"), actor("other", "HeadraceServer:m", "another"),
        actor("headrace", "HeadraceServer:m", "elsewhere", namespace="mine"),
        {"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"}, {"name": "", "namespace": "serve"},
    ]
    monkeypatch.setattr(ray.util, "list_named_actors", lambda all_namespaces: [*others, *ours])
    assert replica_ids("headrace") == {"aa": ours[1]["name"], "zz": ours[0]["name"]}
    assert list(replica_ids("headrace")) == ["aa", "zz"]


def test_what_a_replica_owed_is_forgotten_when_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from replicas import actor_calls as calls

    gone, busy = "SERVE_REPLICA::headrace#m#gone", "SERVE_REPLICA::headrace#m#busy"
    monkeypatch.setattr(calls, "_owed_answers", {gone: object(), busy: object()})
    named = [{"name": busy, "namespace": "serve"}]
    monkeypatch.setattr(ray.util, "list_named_actors", lambda all_namespaces: named)
    calls.replica_ids("headrace")
    assert calls._owed_answers.keys() == {busy}


def test_a_replica_actor_takes_pickled_metadata_and_keyword_arguments() -> None:
    handle_request = name_in("ray.serve._private.replica", "ReplicaActor").handle_request
    assert inspect.iscoroutinefunction(handle_request)
    # Ray adds a keyword of its own once an actor of this class has been made in this process.
    taken = [parameter for name, parameter in parameters(handle_request).items() if name != "_ray_trace_ctx"]
    assert taken[1].name == "pickled_request_metadata"
    assert [parameter.kind for parameter in taken[2:]] == [
        inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    ]


# router/errors.py


def test_bad_requests_are_openai_errors() -> None:
    from router.errors import bad_request

    assert list(parameters(name_in(OPENAI_MODELS, "OpenAIHTTPException"))) == [
        "status_code", "message", "type", "internal_message"
    ]
    error = bad_request("no")
    assert (error.status_code, error.message, error.type) == (400, "no", "invalid_request_error")


# cluster/app.py


def test_the_openai_endpoints_have_the_names_the_ingress_answers_to() -> None:
    endpoints = name_in("ray.llm._internal.serve.core.ingress.ingress", "DEFAULT_ENDPOINTS")
    ingress = name_in("ray.serve.llm.ingress", "OpenAiIngress")
    assert endpoints.keys() >= {"models", "model_data", "completions", "chat"}
    assert all(callable(getattr(ingress, name)) for name in endpoints)
    for name in ("_get_model_id", "model"):
        assert inspect.iscoroutinefunction(getattr(ingress, name))
    assert {"_lora_paths", "_get_lora_model_metadata_func"} <= set(ingress.__init__.__code__.co_names)
    assert list(parameters(ingress._get_response)) == ["self", "body", "call_method", "raw_request"]
    assert inspect.isasyncgenfunction(ingress._get_response)
    assert callable(ingress.get_deployment_options)


def test_the_ingress_takes_a_map_of_endpoints() -> None:
    assert "endpoint_map" in parameters(name_in("ray.serve.llm.ingress", "make_fastapi_ingress"))


def test_deployments_and_model_cards_are_built_from_an_llm_config() -> None:
    build = name_in("ray.llm._internal.serve.core.server.builder", "build_llm_deployment")
    first, *others = parameters(build).values()
    assert first.name == "llm_config"
    assert all(parameter.default is not inspect.Parameter.empty for parameter in others)
    assert list(parameters(name_in(OPENAI_MODELS, "to_model_metadata")))[:2] == ["model_id", "model_config"]


def test_engine_arguments_can_be_changed_before_the_engine_starts() -> None:
    from replicas.server import _open_channel_at

    config_type = name_in("ray.serve.llm", "LLMConfig")
    config = config_type(
        model_loading_config={"model_id": "m"}, engine_kwargs={"additional_config": {"headrace": {"thresholds": {}}}}
    )
    given = config.engine_kwargs["additional_config"]
    _open_channel_at("ipc:///tmp/x", config)
    assert config.engine_kwargs["additional_config"] == {"headrace": {"thresholds": {}, "channel": "ipc:///tmp/x"}}
    assert "channel" not in given["headrace"]  # replicas of one process share what they were given


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_engine_arguments_are_vllm_s(path: Path) -> None:
    from cluster.app import llm_config
    from cluster.config import load_config
    from cluster.ray_llm import engine_argument_names
    from cluster.settings import SCHEDULER

    arguments = {field.name for field in dataclasses.fields(name_in("vllm.engine.arg_utils", "AsyncEngineArgs"))}
    assert set(engine_argument_names()) > arguments, "and those of vLLM's OpenAI layer, which Ray takes there too"
    assert "chat_template" in engine_argument_names()
    assert {"scheduler_cls", "additional_config", "async_scheduling", "model"} <= arguments
    args = load_config(path).application.args
    (entry,) = args.llm_configs
    settings = args.settings_of(entry.model_id)
    config = llm_config(entry, settings)
    assert config.engine_kwargs["scheduler_cls"] == SCHEDULER
    assert config.engine_kwargs["additional_config"]["headrace"]["thresholds"]["policy"] == settings.thresholds.policy
    assert config.engine_kwargs["additional_config"]["headrace"]["trust_tenants"], "our ingress signs every request"
    assert config.deployment_config["num_replicas"] == entry.deployment_config["num_replicas"]


def test_vllm_decides_which_speculators_are_scheduled_ahead() -> None:
    from cluster.app import llm_config
    from cluster.llm_entry import LLMEntry
    from cluster.settings import ModelSettings

    def arguments(engine: dict[str, Any]) -> dict[str, Any]:
        entry = LLMEntry.model_validate({"model_loading_config": {"model_id": "m"}, "engine_kwargs": engine})
        return dict(llm_config(entry, ModelSettings()).engine_kwargs)

    assert arguments({})["async_scheduling"] is True
    assert "async_scheduling" not in arguments({"speculative_config": {"method": "ngram"}})


def test_the_scheduler_is_where_the_engine_looks_for_it() -> None:
    from cluster.settings import SCHEDULER

    module, _, name = SCHEDULER.rpartition(".")
    assert inspect.isclass(name_in(module, name))


# replicas/server.py


def test_the_server_has_what_headrace_overrides_and_calls() -> None:
    from replicas.server import HeadraceServer

    server = name_in("ray.serve.llm.deployment", "LLMServer")
    for method in ("chat", "completions", "record_routing_stats"):
        assert callable(getattr(server, method))
    assert inspect.iscoroutinefunction(server.record_routing_stats)
    assert inspect.iscoroutinefunction(server.__init__)
    assert inspect.iscoroutinefunction(server.__del__)
    assert list(parameters(server.__init__))[:2] == ["self", "llm_config"]
    assert HeadraceServer.__name__ == name_in("replicas.actor_calls", "SERVER_CLASS")
    assert parameters(HeadraceServer.telemetry)["cursor"].default == 0
    assert list(parameters(HeadraceServer.apply_thresholds)) == ["self", "offer", "rank"]
    assert list(parameters(HeadraceServer.stats)) == ["self", "rank"]


TELEMETRY = Telemetry(
    engine_id="e", clock_s=0.0, cursor=0, limits=LIMITS, thresholds=Thresholds(max_running=8),
    from_config=True, gauges=Gauges(running=2, waiting=1, kv_used_tokens=250), counters=Counters(),
)
STATS = Stats.of_engine("e", LIMITS, TELEMETRY.thresholds, TELEMETRY.gauges)
EIGHT_SLOTS = RoutingStats(
    slots=8, occupied=3, kv_used_fraction=0.25, kv_capacity_tokens=1000, marks=Marks(0, b"")
)
ACK = Ack(accepted=True, active_version=-1)


class Channel:
    """Stands for the channel of one engine."""

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.asked: list[str] = []

    async def ask(self, question: bytes, *, timeout_s: float) -> bytes:
        if self.silent:
            raise ChannelClosed("the engine did not answer")
        self.asked.append(type(read_question(question)).__name__)
        return answer_of(STATS if self.asked[-1] == "AskStats" else TELEMETRY)


@pytest.fixture
def server_over(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    from replicas.server import HeadraceServer

    async def nothing(self: Any) -> dict[str, Any]:
        return {}

    class Server(HeadraceServer):
        def __del__(self) -> None: ...

    def made(*channels: Channel) -> Any:
        server = object.__new__(Server)
        server._deliveries = Deliveries()
        server._channels, server._last_stats, server._silent = list(channels), {}, set()
        server._marks = LatestMarks()
        return server

    monkeypatch.setattr(name_in("ray.serve.llm.deployment", "LLMServer"), "record_routing_stats", nothing)
    return made


def stats_of(server: Any) -> RoutingStats | None:
    return RoutingStats.from_dict(asyncio.run(server.record_routing_stats()))


def test_routing_asks_for_stats_and_for_nothing_larger(server_over: Callable[..., Any]) -> None:
    channel = Channel()
    assert dataclasses.replace(stats_of(server_over(channel)), at_s=None) == EIGHT_SLOTS
    assert channel.asked == ["AskStats"]


@pytest.mark.parametrize(("method", "body"), [
    ("chat", {"messages": [{"role": "user", "content": "u" * 900}]}), ("completions", {"prompt": "p" * 900}),
    ("completions", {"prompt": [10**40] * 900}), ("chat", {"messages": 7}),
])
def test_a_replica_tells_the_prompts_that_it_has_computed(
    monkeypatch: pytest.MonkeyPatch, server_over: Callable[..., Any], method: str, body: dict[str, Any]
) -> None:
    refused = False

    async def engine() -> AsyncGenerator[Any, None]:
        if refused:
            raise ValueError("the prompt is too long")
        yield SimpleNamespace(request_id="r", outputs=[SimpleNamespace(index=0)], metrics=None)

    async def answered(self: Any, request: Any, raw_request_info: Any = None) -> Any:
        return noting(engine)()

    monkeypatch.setattr(name_in("ray.serve.llm.deployment", "LLMServer"), method, answered)
    server, request = server_over(Channel()), SimpleNamespace(stream=True, **body)
    server._draining = SimpleNamespace(begun=False)

    async def asked() -> int:
        return len([chunk async for chunk in await getattr(server, method)(request)])

    refused = True
    with pytest.raises(ValueError, match="too long"):
        asyncio.run(asked())
    assert stats_of(server).marks.after(0) == []
    refused = False
    assert asyncio.run(asked()) == 1, "whatever its prompt is"
    told, blocks = stats_of(server).marks.after(0), list(blocks_in(request))
    assert [mark for mark, _ in told] == blocks[::-1] and len(blocks) in (0, 3)


def test_what_a_replica_answers_is_json(server_over: Callable[..., Any]) -> None:
    server = server_over(Channel())
    server._deliveries._latest.append(Delivered(1, 0.01, None))
    assert read_answer(asyncio.run(server.stats()), Stats) == STATS
    assert read_answer(asyncio.run(server.telemetry(cursor=None)), Telemetry) == TELEMETRY
    with_records = dataclasses.replace(TELEMETRY, delivered=(Delivered(1, 0.01, None),))
    assert read_answer(asyncio.run(server.telemetry(cursor=0)), Telemetry) == with_records


def test_a_silent_engine_is_an_answer_and_no_exception_of_ours(server_over: Callable[..., Any]) -> None:
    server = server_over(Channel(silent=True))
    for answer, kind in ((server.stats(), Stats), (server.telemetry(), Telemetry)):
        with pytest.raises(QuestionFailed, match="the engine did not answer"):
            read_answer(asyncio.run(answer), kind)
    ack = read_answer(asyncio.run(server.apply_thresholds(offer_of(Thresholds(), automatic=True))), Ack)
    assert (ack.accepted, ack.code, ack.active_version) == (False, "unavailable", -1)


def test_a_silent_engine_is_told_of_once_and_its_last_stats_serve_on(
    monkeypatch: pytest.MonkeyPatch, server_over: Callable[..., Any]
) -> None:
    from replicas import server as server_module

    warnings: list[str] = []
    monkeypatch.setattr(server_module.logger, "warning", lambda text, *said: warnings.append(text % said))
    channel = Channel()
    server = server_over(channel)
    last = stats_of(server)
    assert dataclasses.replace(last, at_s=None) == EIGHT_SLOTS
    channel.silent = True
    for _ in range(3):
        again = stats_of(server)
        assert dataclasses.replace(again, at_s=last.at_s) == last
        assert again.at_s == last.at_s, "the time of the report, to the bit: a router must see that it is no new one"
    assert warnings == ["no routing stats from the engine of rank 0: the engine did not answer"]


def test_a_replica_s_room_is_that_of_all_its_ranks_also_while_one_is_silent(
    monkeypatch: pytest.MonkeyPatch, server_over: Callable[..., Any]
) -> None:
    from replicas import server as server_module

    now_s = [100.0]
    monkeypatch.setattr(server_module, "time", SimpleNamespace(monotonic=lambda: now_s[0], time=lambda: 1e9 + now_s[0]))
    silent = Channel()
    server = server_over(Channel(), silent)
    both = RoutingStats(
        slots=16, occupied=6, kv_used_fraction=0.25, at_s=1e9 + 100.0, kv_capacity_tokens=2000, marks=Marks(0, b"")
    )
    assert stats_of(server) == both
    silent.silent, now_s[0] = True, 120.0
    assert stats_of(server) == both, "its last report serves a while longer"
    now_s[0] = 131.0
    assert stats_of(server) == dataclasses.replace(EIGHT_SLOTS, at_s=1e9 + 131.0)


def test_a_replica_reaches_each_rank_s_engine_by_its_own_channel(server_over: Callable[..., Any]) -> None:
    endpoint = new_endpoint()
    engines = [ActiveThresholds(Thresholds(), LIMITS, lambda: 0.0) for _ in range(2)]
    channels = [
        ChannelServer(
            rank_endpoint(endpoint, rank), engine.offer, lambda _: TELEMETRY, lambda: STATS, *[lambda _: ACK] * 2
        )
        for rank, engine in enumerate(engines)
    ]

    async def set_one() -> Ack:
        server = server_over(*(ChannelClient(rank_endpoint(endpoint, rank)) for rank in range(2)))
        try:
            for rank in range(2):
                assert read_answer(await server.telemetry(rank=rank), Telemetry) == TELEMETRY
                assert read_answer(await server.stats(rank=rank), Stats) == STATS
            offer = offer_of(Thresholds(version=1, max_running=4), automatic=False)
            return read_answer(await server.apply_thresholds(offer, rank=1), Ack)
        finally:
            for client in server._channels:
                client.close()

    try:
        assert asyncio.run(set_one()).accepted
        assert [engine.current().thresholds.max_running for engine in engines] == [None, 4]
    finally:
        for channel in channels:
            channel.close()
        remove_endpoint(endpoint)


# router/request_router.py


def test_the_request_router_has_what_ours_is_made_of() -> None:
    from router.request_router import FluidRouter

    base = name_in("ray.serve.request_router", "RequestRouter")
    assert inspect.iscoroutinefunction(base.choose_replicas)
    assert list(parameters(base.choose_replicas)) == list(parameters(FluidRouter.choose_replicas))
    for attribute in ("curr_replicas", "replica_queue_len_cache"):
        assert isinstance(inspect.getattr_static(base, attribute), property)
    cache = name_in("ray.serve._private.request_router.common", "ReplicaQueueLengthCache")
    assert cache(get_curr_time_s=lambda: 0.0).get("unknown") is None
    running = name_in("ray.serve.request_router", "RunningReplica")
    for attribute in ("replica_id", "routing_stats"):
        assert isinstance(inspect.getattr_static(running, attribute), property)
    assert callable(FluidRouter.apply_locality_routing)
    assert callable(FluidRouter.apply_multiplex_routing)
    for hook in ("initialize_state", "update_replicas"):
        assert callable(getattr(base, hook))
    assert "initialize_state(" in inspect.getsource(name_in("ray.serve._private.router", "AsyncioRouter"))


def test_serve_tells_the_router_which_replica_accepted_a_request() -> None:
    from router.request_router import FluidRouter

    base = name_in("ray.serve.request_router", "RequestRouter")
    assert list(parameters(base.on_request_routed)) == list(parameters(FluidRouter.on_request_routed))
    assert list(parameters(base.on_request_completed)) == list(parameters(FluidRouter.on_request_completed))
    finished = inspect.getsource(name_in("ray.serve._private.router", "AsyncioRouter")._process_finished_request)
    assert "on_request_completed(" in finished
    assert callable(name_in("ray.serve._private.replica_result", "ReplicaResult").cancel)
    routing = inspect.getsource(name_in("ray.serve._private.router", "AsyncioRouter")._route_and_send_request_once)
    accepted = routing.index("if queue_info.accepted:")
    assert accepted < routing.index("on_request_routed(") < routing.index("except ActorDiedError")
    for router in (base, name_in("ray.serve.request_router", "FIFOMixin"), FluidRouter):
        assert list(parameters(router._fulfill_next_pending_request)) == ["self", "replica", "request_metadata"]


def test_a_request_has_one_internal_id_at_the_ingress_and_in_the_router() -> None:
    source = inspect.getsource(name_in("ray.serve._private.default_impl", "get_request_metadata"))
    assert "internal_request_id=_request_context._internal_request_id" in source
    assert "_internal_request_id" in vars(name_in("ray.serve.context", "_get_serve_request_context")())
    context = {field.name for field in dataclasses.fields(name_in("ray.serve._private.common", "RequestMetadata"))}
    assert "internal_request_id" in context


def test_the_router_that_serve_pickles_knows_the_record_of_the_process_it_runs_in() -> None:
    from ray.serve.config import RequestRouterConfig

    from router import rotation
    from router.request_router import FluidRouter

    config = RequestRouterConfig(request_router_class=FluidRouter)
    carried = config.get_request_router_class()
    assert carried.choose_replicas.__globals__["rotation"].ROTATION is rotation.ROTATION


# simulator/scenario/routers.py


def test_ray_s_prefix_tree_finds_who_has_the_longest_prefix() -> None:
    tree = name_in("ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree", "PrefixTree")()
    tree.add_tenants(["a", "b"], 0.0)
    tree.insert("some text", "a", 1.0)
    assert tree.prefix_match("some other", ["a", "b"]) == ("some ", ["a"])
    assert tree.get_smallest_tenants() == ["b"]


# router/attempts.py, router/ingress.py


def test_ray_s_ingress_streams_through_a_response_whose_iterator_can_be_replaced() -> None:
    source = inspect.getsource(name_in("ray.serve.llm.ingress", "OpenAiIngress")._process_llm_request)
    assert "return StreamingResponse(" in source and "_openai_json_wrapper" in source
    assert "body_iterator" in vars(name_in("starlette.responses", "StreamingResponse")(iter(())))
    wrapper = inspect.getsource(name_in("ray.llm._internal.serve.core.ingress.ingress", "_openai_json_wrapper"))
    assert 'yield "data: [DONE]' in wrapper, "which is why ours cuts it off after an error"


def test_the_errors_of_a_dead_replica_are_one_kind_and_a_failed_deployment_another() -> None:
    kind = name_in("ray.exceptions", "RayActorError")
    for name in ("ActorDiedError", "ActorUnavailableError"):
        assert issubclass(name_in("ray.exceptions", name), kind)
    assert not issubclass(name_in("ray.serve.exceptions", "DeploymentUnavailableError"), kind)
    response = name_in(OPENAI_MODELS, "ErrorResponse")(
        error=name_in(OPENAI_MODELS, "ErrorInfo")(message="m", type="recalled", code=503)
    )
    assert (response.error.type, response.error.code) == ("recalled", 503)


# replicas/ray_patches.py


def test_serve_replicas_open_their_port_through_the_function_we_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = importlib.import_module("ray.serve._private.replica")
    source = inspect.getsource(replica)
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in source
    bound: list[str] = []
    monkeypatch.setattr(replica, "add_port_to_grpc_server", lambda server, address: bound.append(address))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    name_in("replicas.ray_patches", "listen_where_the_node_does")()
    replica.add_port_to_grpc_server(None, "[::]:0")
    assert bound == ["127.0.0.1:0"]


def test_a_replica_hears_of_its_stop_before_serve_waits_for_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = name_in("ray.serve._private.replica", "Replica")
    actor = inspect.getsource(name_in("ray.serve._private.replica", "ReplicaActor").perform_graceful_shutdown)
    assert "self._replica_impl.perform_graceful_shutdown()" in actor
    own = inspect.getsource(replica._perform_graceful_shutdown)
    assert "self._deployment_config.graceful_shutdown_timeout_s" in own
    assert own.index("_drain_ongoing_requests") < own.index("self._quiescing = True") < own.index("shutdown()")
    done: list[Any] = []

    async def perform(self: Any) -> None:
        done.append("Serve waits")

    monkeypatch.setattr(replica, "perform_graceful_shutdown", perform)
    name_in("replicas.ray_patches", "on_graceful_shutdown")(done.append)
    stopping = SimpleNamespace(_deployment_config=SimpleNamespace(graceful_shutdown_timeout_s=600.0))
    asyncio.run(replica.perform_graceful_shutdown(stopping))
    assert done == [600.0, "Serve waits"]

    def fails(within_s: float) -> None:
        raise RuntimeError

    name_in("replicas.ray_patches", "on_graceful_shutdown")(fails)
    asyncio.run(replica.perform_graceful_shutdown(stopping))
    assert done[2:] == [600.0, "Serve waits"], "a hook that fails does not keep the replica"


def test_on_a_real_cluster_the_port_stays_where_ray_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = importlib.import_module("ray.serve._private.replica")
    before = replica.add_port_to_grpc_server
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    name_in("replicas.ray_patches", "listen_where_the_node_does")()
    assert replica.add_port_to_grpc_server is before


# replicas/ray_patches.py


def test_adapters_are_read_from_a_folder_through_the_function_we_widen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.llm_entry import LLMEntry

    file_system = name_in("ray.llm._internal.common.utils.cloud_filesystem.pyarrow_filesystem", "PyArrowFileSystem")
    monkeypatch.setattr(file_system, "get_fs_and_path", staticmethod(file_system.get_fs_and_path))  # restored after
    lora = importlib.import_module("ray.llm._internal.serve.utils.lora_serve_utils")
    listed = name_in("ray.llm._internal.common.utils.lora_utils", "get_lora_model_ids")
    adapters = tmp_path / "adapters"
    (adapters / "north").mkdir(parents=True)
    (adapters / "north" / "adapter_config.json").write_text('{"r": 8, "max_length": 512}')
    entry = LLMEntry.model_validate({
        "model_loading_config": {"model_id": "m"}, "lora_config": {"dynamic_lora_loading_path": f"file://{adapters}"},
    })
    config = name_in("ray.serve.llm", "LLMConfig").model_validate(entry.own)
    address = config.lora_config.dynamic_lora_loading_path
    assert listed(address, "m") == [], "Ray by itself does not read folders"
    name_in("replicas.ray_patches", "take_adapters_from_folders")()
    assert listed(address, "m") == ["m:north"]
    assert asyncio.run(lora.get_lora_model_metadata("m:north", address))["max_request_context_length"] == 512
    server = inspect.getsource(name_in("ray.serve.llm.deployment", "LLMServer")._init_multiplex_loader)
    assert "model_downloader_cls(\n                download_timeout_s=" in server, "the folder is the first argument"
    loader = name_in("replicas.ray_patches", "adapter_loader")(tmp_path / "of-a-replica")(max_tries=1)
    assert isinstance(loader, lora.LoraModelLoader)
    loaded = asyncio.run(loader.load_model_from_config("m:north", config))
    assert (Path(loaded.local_path) / "adapter_config.json").is_file()
    assert tmp_path / "of-a-replica" in Path(loaded.local_path).parents
    with pytest.raises(ValueError, match="Unsupported URI scheme"):
        file_system.get_fs_and_path("ftp://host/adapters")


def test_a_callback_may_skip_the_download_before_a_node_starts() -> None:
    engine = inspect.getsource(importlib.import_module("ray.llm._internal.serve.engines.vllm.vllm_engine"))
    assert engine.index('run_callback("on_before_node_init")') < engine.index("if callback.ctx.run_init_node:")
    fields = {f.name for f in dataclasses.fields(name_in("ray.llm._internal.common.callbacks.base", "CallbackCtx"))}
    assert "run_init_node" in fields
    callback = name_in("ray.llm._internal.common.callbacks.base", "CallbackBase")
    assert issubclass(name_in("replicas.ray_patches", "NoDownload"), callback)
    assert inspect.iscoroutinefunction(callback.on_before_node_init)


# router/errors.py


def test_plain_http_errors_speak_openai_too() -> None:
    from fastapi import HTTPException
    from fastapi.testclient import TestClient

    app = name_in("router.errors", "speak_openai")(name_in("ray.llm._internal.serve.core.ingress.ingress", "init")())

    @app.get("/unknown-model")
    def rejected() -> None:
        raise HTTPException(404, "no model gpt-9")

    client = TestClient(app)
    for path, message in (("/unknown-model", "no model gpt-9"), ("/nowhere", "Not Found")):
        answer = client.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == message


# router/http_app.py, router/errors.py, router/ingress.py


def test_what_the_http_app_takes_from_rays_ingress() -> None:
    middleware = name_in("ray.llm._internal.serve.core.ingress.middleware", "SetRequestIdMiddleware")
    assert list(parameters(middleware)) == ["app"]
    metrics = "ray.llm._internal.serve.observability.metrics.fast_api_metrics"
    assert callable(name_in(metrics, "metrics_lifespan")) and callable(name_in(metrics, "add_http_metrics_middleware"))
    errors = name_in("ray.llm._internal.common.errors", "VLLM_CLIENT_ERRORS")
    assert errors and all(issubclass(error, Exception) for error in errors)
    ingress = name_in("ray.serve.llm.ingress", "OpenAiIngress")({}, {})
    assert ingress._model_cards == {}


def test_ray_tells_content_of_a_wrong_type_from_its_own_failures() -> None:
    from pydantic import ValidationError

    request = name_in(OPENAI_MODELS, "ChatCompletionRequest")(
        model="m", messages=[{"role": "user", "content": ["plain text in a list"]}]
    )
    with pytest.raises(ValueError, match="content") as raised:
        name_in("ray.llm._internal.serve.core.ingress.utils", "_sanitize_chat_completion_request")(request)
    assert type(raised.value) is ValueError and isinstance(raised.value.__cause__, ValidationError)
