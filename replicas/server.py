"""`HeadraceServer`: one replica. Ray's LLMServer plus the control channel into its engine.

The replica owns the channel: it names the endpoint before the engine starts, passes thresholds in, telemetry out, and
tells Serve's request routers how much room it has. It never waits for the controller: it starts, and restarts, with the
configured thresholds.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from replicas.delivery import Deliveries
from replicas.localhost import listen_where_the_node_does
from replicas.routing_stats import RoutingStats
from scheduler.channel import ChannelClient, ChannelClosed, new_endpoint, remove_endpoint
from scheduler.messages import Ack, Telemetry
from scheduler.settings import SETTINGS_KEY
from scheduler.thresholds import Thresholds

_STALE_STATS_S = 30.0
logger = logging.getLogger(__name__)


class HeadraceServer(LLMServer):
    """A vLLM replica whose scheduler takes thresholds while it serves."""

    async def __init__(self, llm_config: LLMConfig, **kwargs: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        listen_where_the_node_does()
        self._endpoint = new_endpoint()
        _open_channel_at(self._endpoint, llm_config)
        self._channel = ChannelClient(self._endpoint)
        self._last_stats: tuple[float, RoutingStats] | None = None
        self._engine_silent = False
        self._deliveries = Deliveries()
        from replicas.engine import HeadraceEngine  # imports vLLM, which whoever only deploys need not wait for

        await super().__init__(llm_config, **({"engine_cls": HeadraceEngine} | kwargs))

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        """Ray's own; what leaves is timed."""
        delivery = self._deliveries.begin()
        chunks = await super().chat(request, raw_request_info)
        return self._deliveries.timed(delivery, chunks, streamed=bool(request.stream))

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        """Ray's own; what leaves is timed."""
        delivery = self._deliveries.begin()
        chunks = await super().completions(request, raw_request_info)
        return self._deliveries.timed(delivery, chunks, streamed=bool(request.stream))

    async def apply_thresholds(self, thresholds: Thresholds, automatic: bool = True) -> Ack:
        """Offer thresholds to the engine; the Ack names the version in force now, taken or not."""
        try:
            return await self._channel.apply(thresholds, automatic=automatic)
        except ChannelClosed as error:
            return Ack(accepted=False, version_in_force=-1, reason=str(error), code="unavailable")

    async def telemetry(self, cursor: int | None = 0) -> Telemetry:
        """The engine's telemetry with the records after `cursor`, and the latest answers as they left this replica.

        Raises:
            ChannelClosed: the engine does not answer.
        """
        telemetry = await self._channel.report(cursor)
        return telemetry if cursor is None else replace(telemetry, delivered=self._deliveries.latest())

    async def record_routing_stats(self) -> dict[str, Any]:
        """What Serve's request routers see of this replica: its seats and who takes them (`RoutingStats`)."""
        stats: dict[str, Any] = dict(await super().record_routing_stats())
        try:
            telemetry = await self._channel.report(cursor=None, timeout_s=1.0)
            self._last_stats = (time.monotonic(), RoutingStats.from_telemetry(telemetry))
            self._engine_silent = False
        except ChannelClosed as error:
            # The latest known stats serve a while longer, then routers treat this replica as unknown.
            if not self._engine_silent:
                logger.warning("no routing stats from the engine: %s", error)
            self._engine_silent = True
        if self._last_stats and time.monotonic() - self._last_stats[0] < _STALE_STATS_S:
            stats |= self._last_stats[1].as_dict()
        return stats

    async def __del__(self) -> None:
        self._channel.close()
        remove_endpoint(self._endpoint)
        await super().__del__()


def _open_channel_at(endpoint: str, llm_config: LLMConfig) -> None:
    additional = copy.deepcopy(llm_config.engine_kwargs.get("additional_config") or {})
    additional.setdefault(SETTINGS_KEY, {})["channel"] = endpoint
    llm_config.update_engine_kwargs(additional_config=additional)
