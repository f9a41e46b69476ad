"""The settings of a model that are in force: as they were deployed, or as an operator changed them since.

Serve hands the deployed ones to every replica (`user_config`). An operator's change is kept in the cluster's store with
a digest of the deployed settings that it changed: it holds until other settings are deployed, for every process that
looks, new replicas among them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from replicas.store import Store
from scheduler.messages import Ack
from scheduler.settings import LiveSettings
from scheduler.wire import read_answer, settings_question

LOOK_EVERY_S = 1.0
logger = logging.getLogger(__name__)
Settings = Mapping[str, Any]


def engine_settings(settings: Settings) -> LiveSettings:
    """The part of a model's settings that is its engines'.

    Raises:
        ValueError: naming the key, the value and what is allowed.
    """
    controller = settings.get("controller", {})
    wanted = {key: settings[key] for key in ("thresholds", "targets") if key in settings}
    wanted |= {key: controller[key] for key in ("profile", "overflow_probability") if key in controller}
    return LiveSettings.parse(wanted, "settings")


def store_key(model_id: str) -> str:
    """Where an operator's change of a model's settings is kept."""
    return f"settings/{model_id}"


def digest(settings: Settings) -> str:
    """A fingerprint of settings; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def kept_change(deployed: Settings, changed: Settings, **author: Any) -> dict[str, Any]:
    """What is kept of an operator's change of the deployed settings."""
    return {"instead_of": digest(deployed), "settings": dict(changed), **author}


def in_force(deployed: Settings, kept: Any) -> Settings:
    """The settings in force, given what the store has of a change (None: nothing)."""
    holds = isinstance(kept, dict) and kept.get("instead_of") == digest(deployed)
    return kept["settings"] if holds and isinstance(kept.get("settings"), dict) else deployed


class SettingsFollower:
    """Brings one replica's engines to the settings in force, and keeps them there.

    ask: passes a question to the engine of a rank; ranks: how many there are; follow: called with settings that differ
    from those before, for what is not the engines'; taken: called when an engine has taken them. `look` is called every
    second, so that a change that was missed, or an engine that did not answer, is a second late.
    """

    def __init__(
        self, model_id: str, ranks: int, ask: Callable[[int, bytes], Awaitable[bytes]], store: Store,
        follow: Callable[[Settings], None] = lambda settings: None, taken: Callable[[], None] = lambda: None,
    ) -> None:
        self._follow, self._taken = follow, taken
        self._key, self._ranks, self._ask, self._store = store_key(model_id), ranks, ask, store
        self._deployed: Settings = {}
        self.settings: Settings = {}
        self._kept: Any = None
        self._revision = 0
        self._acks: dict[int, tuple[int, Ack]] = {}
        self._looking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def deployed(self, settings: Settings) -> None:
        """Follow newly deployed settings; returns once the engines that answer have them."""
        self._deployed = settings
        await self.look()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._keep_looking())

    async def look(self) -> dict[int, Ack]:
        """Look for a change and tell the engines that have not answered yet; their latest answers by rank."""
        async with self._looking:
            with contextlib.suppress(Exception):  # the store is away: what was known last holds
                self._kept = await asyncio.to_thread(self._store.get, self._key)
            wanted = in_force(self._deployed, self._kept)
            if wanted != self.settings or not self._revision:
                self.settings, self._revision = wanted, self._revision + 1
                self._follow(wanted)
            question = settings_question(engine_settings(wanted).as_dict(), self._revision)
            await asyncio.gather(*(self._tell(rank, question) for rank in range(self._ranks)))
            return {rank: ack for rank, (_, ack) in self._acks.items()}

    async def _tell(self, rank: int, question: bytes) -> None:
        revision, ack = self._acks.get(rank, (0, None))
        if revision == self._revision and ack is not None and ack.code != "unavailable":
            return  # taken, or refused for good
        ack = read_answer(await self._ask(rank, question), Ack)
        if not ack.accepted and ack.code != "unavailable":
            logger.error("the engine of rank %d does not take the settings: %s", rank, ack.reason)
        self._acks[rank] = (self._revision, ack)
        if ack.accepted:
            self._taken()

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.look()
            except Exception:  # such as settings of another release; the next second may bring others
                logger.exception("the settings could not be followed")

    def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
