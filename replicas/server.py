"""`HeadraceServer`: one replica. Ray's LLMServer plus the control channels into its engines, one a data-parallel rank.

The replica owns the channels: it names the endpoint before the engine starts, forwards questions and answers as JSON
(`scheduler.wire`), and reports its slots and occupancy to Serve's request routers. It starts, and restarts, with the
configured thresholds, without waiting for the controller.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any, NamedTuple

import psutil
from ray import serve
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from replicas.cluster_store import ClusterStore
from replicas.controller_calls import ToController
from replicas.delivery import Deliveries
from replicas.draining import Draining
from replicas.engine_client import end_process
from replicas.engine_health import ENGINE_TIMEOUT_S, EngineHealth
from replicas.live_settings import Settings, SettingsFollower
from replicas.logs import follow_serve
from replicas.marks import LatestMarks
from replicas.measured import EnginesMeter, RequestMeter, keep_telling, tenant_in
from replicas.prompt_blocks import blocks_in
from replicas.ranks import engine_name
from replicas.ray_patches import (
    adapter_loader,
    listen_where_the_node_does,
    on_graceful_shutdown,
    take_adapters_from_folders,
)
from replicas.reports import Reporter
from replicas.routing_stats import RoutingStats
from replicas.tracing import OTLP_ENDPOINT, Tracing
from scheduler.engine import segments
from scheduler.engine.channel import (
    ChannelClient,
    ChannelClosed,
    folder_of,
    new_endpoint,
    rank_endpoint,
    remove_endpoint,
)
from scheduler.messages import Ack, Stats, Telemetry
from scheduler.settings import SETTINGS_KEY
from scheduler.support import ranks_in
from scheduler.wire import (
    QuestionFailed,
    UnreadableMessage,
    answer_of,
    read_answer,
    stats_question,
    telemetry_question,
    with_delivered,
)

_STALE_STATS_S = 30.0
_STATS_ANSWER_S = 1.0
_ANSWER_S = 4.0
"""Shorter than the caller's timeout, so that a silent engine does not look like a silent replica."""
logger = logging.getLogger(__name__)


class _Reported(NamedTuple):
    """An engine's stats, and when they were asked for, by both clocks."""

    monotonic_s: float
    unix_s: float
    stats: Stats


class HeadraceServer(LLMServer):
    """A vLLM replica that takes new thresholds while it serves."""

    async def __init__(self, llm_config: LLMConfig, **kwargs: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        follow_serve()
        listen_where_the_node_does()
        take_adapters_from_folders()
        self._endpoint = new_endpoint()
        _open_channel_at(self._endpoint, llm_config)
        ranks = ranks_in(llm_config.engine_kwargs)
        self._channels = [ChannelClient(rank_endpoint(self._endpoint, rank)) for rank in range(ranks)]
        self._last_stats: dict[int, _Reported] = {}
        self._silent: set[int] = set()
        self._marks = LatestMarks()
        self._draining = Draining(self._channels)
        self._telling: asyncio.Task[None] | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._reporter: Reporter | None = None
        loop = asyncio.get_running_loop()
        on_graceful_shutdown(lambda within_s: loop.call_soon_threadsafe(self._draining.begin, within_s))
        self.health = EngineHealth(self._current_stats, ranks, partial(end_process, self._endpoint))
        context = serve.get_replica_context()
        store = ClusterStore(context.app_name)
        tracing = Tracing(
            llm_config.engine_kwargs.get(OTLP_ENDPOINT), service="headrace-replica",
            instance=context.replica_id.unique_id,
        )
        self._deliveries = Deliveries(RequestMeter(llm_config.model_id).record, tracing=tracing)
        self._settings = SettingsFollower(
            llm_config.model_id, ranks, self._ask, store, self._follow, self._report_soon
        )
        from replicas.engine import HeadraceEngine  # imports vLLM, which a process that only deploys does not need

        ours = {"engine_cls": HeadraceEngine, "model_downloader": adapter_loader(folder_of(self._endpoint))}
        await super().__init__(llm_config, **(ours | kwargs))
        if isinstance(self.engine, HeadraceEngine):
            self.engine.be_watched(self.health)
        names = [engine_name(context.replica_id.unique_id, rank, ranks) for rank in range(ranks)]
        self._telling = loop.create_task(
            keep_telling(EnginesMeter(llm_config.model_id, names, self._current_telemetry).tell)
        )
        to_controller = ToController(context.app_name, context.deployment)
        self._reporter = Reporter(names, self._ask, self._deliveries.latest, to_controller)
        self._reporting = loop.create_task(self._reporter.keep_reporting())
        children = [process.pid for process in psutil.Process().children(recursive=True)]
        segments.note(folder_of(self._endpoint), children)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take new settings; Serve calls it after the start and whenever others are deployed."""
        await self._settings.deployed(user_config)

    def _follow(self, settings: Settings) -> None:
        """The settings are now these; the engines are told by `SettingsFollower`."""
        self.health.engine_timeout_s = settings.get("engine_timeout_s", ENGINE_TIMEOUT_S)

    def _report_soon(self) -> None:
        if self._reporter is not None:
            self._reporter.soon()

    async def look_at_settings(self) -> dict[str, dict[str, Any]]:
        """Take an operator's change of settings now; by rank, whether its engine took it, and why not."""
        acks = await self._settings.look()
        return {str(rank): {"accepted": ack.accepted, "reason": ack.reason} for rank, ack in acks.items()}

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        """Ray's own, with delivery times recorded."""
        if self._draining.begun:
            return self._recalled(request)
        delivery = self._begin(request, raw_request_info)
        chunks = await super().chat(request, raw_request_info)
        return self._deliveries.timed(delivery, chunks, streamed=bool(request.stream))

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        """Ray's own, with delivery times recorded."""
        if self._draining.begun:
            return self._recalled(request)
        delivery = self._begin(request, raw_request_info)
        chunks = await super().completions(request, raw_request_info)
        return self._deliveries.timed(delivery, chunks, streamed=bool(request.stream))

    def _begin(self, request: Any, raw_request_info: Any) -> Any:
        """The delivery of a request. Routers are told of its prompt once it is computed: one that the engine refuses is
        held nowhere."""
        return self._deliveries.begin(
            tenant_in(request), raw_request_info, lambda: self._marks.note(blocks_in(request))
        )

    async def _recalled(self, request: Any) -> AsyncGenerator[Any, None]:
        from replicas.engine import recalled

        yield recalled(self._draining.recall(str(request.request_id)))

    async def drain(self, within_s: float) -> None:
        """Admit nothing more and finish what has begun, within a bound; an operator stops the application."""
        self._draining.begin(within_s)

    async def check_health(self) -> None:
        """Asked by Serve: raises when the engine has failed, also when it is frozen."""
        self.health.check()
        await super().check_health()

    async def apply_thresholds(self, offer: bytes, rank: int = 0) -> bytes:
        """Pass an offer of thresholds to the engine of a rank; the answer is an `Ack`."""
        return await self._ask(rank, offer)

    async def telemetry(self, cursor: int | None = 0, rank: int = 0) -> bytes:
        """The `Telemetry` of a rank's engine with the records after `cursor`, and the latest
        delivery times; or an `Ack` with the reason why there is none."""
        answer = await self._ask(rank, telemetry_question(cursor))
        # Deliveries are not known by rank: with several ranks only the engines' own times are used.
        alone = cursor is not None and len(self._channels) == 1
        return with_delivered(answer, self._deliveries.latest()) if alone else answer

    async def stats(self, rank: int = 0) -> bytes:
        """The `Stats` of a rank's engine, or an `Ack` with the reason why there are none."""
        return await self._ask(rank, stats_question())

    async def _ask(self, rank: int, question: bytes) -> bytes:
        try:
            return await self._channels[rank].ask(question, timeout_s=_ANSWER_S)
        except ChannelClosed as error:
            return answer_of(Ack.without_version(str(error)))

    async def record_routing_stats(self) -> dict[str, Any]:
        """What Serve's request routers see of this replica (`RoutingStats`)."""
        routing: dict[str, Any] = dict(await super().record_routing_stats())
        await asyncio.gather(*(self._refresh_stats(rank) for rank in range(len(self._channels))))
        # Stats older than 30 s are dropped; routers then rank the replica as one without a report.
        now_s = time.monotonic()
        latest = [one for one in self._last_stats.values() if one.monotonic_s > now_s - _STALE_STATS_S]
        if not latest:
            return routing
        oldest_s = min(one.unix_s for one in latest)  # the same for as long as nothing new is known
        return routing | RoutingStats.of_engines([one.stats for one in latest], oldest_s, self._marks.told()).as_dict()

    async def _refresh_stats(self, rank: int) -> None:
        asked_s, asked_unix_s = time.monotonic(), time.time()  # what comes while the engine answers may not be in it
        try:
            stats = await self._current_stats(rank)
        except (ChannelClosed, QuestionFailed, UnreadableMessage) as error:
            if rank not in self._silent:
                logger.warning("no routing stats from the engine of rank %d: %s", rank, error)
            self._silent.add(rank)
            return
        self._last_stats[rank] = _Reported(asked_s, asked_unix_s, stats)
        self._silent.discard(rank)

    async def _current_stats(self, rank: int) -> Stats:
        return read_answer(await self._channels[rank].ask(stats_question(), timeout_s=_STATS_ANSWER_S), Stats)

    async def _current_telemetry(self, rank: int) -> Telemetry:
        answer = await self._channels[rank].ask(telemetry_question(None), timeout_s=_STATS_ANSWER_S)
        return read_answer(answer, Telemetry)

    async def __del__(self) -> None:
        for task in (self._telling, self._reporting):
            if task is not None:
                task.cancel()
        self._draining.stop()
        self.health.stop()
        self._settings.close()
        for channel in self._channels:
            channel.close()
        try:
            await super().__del__()
        finally:
            remove_endpoint(self._endpoint)


def _open_channel_at(endpoint: str, llm_config: LLMConfig) -> None:
    additional = copy.deepcopy(llm_config.engine_kwargs.get("additional_config") or {})
    additional.setdefault(SETTINGS_KEY, {})["channel"] = endpoint
    llm_config.update_engine_kwargs(additional_config=additional)
