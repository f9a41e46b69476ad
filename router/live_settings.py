"""The settings of every model, as one ingress sees and changes them. No HTTP and no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from replicas.live_settings import LOOK_EVERY_S, Settings, engine_settings, in_force, kept_change, store_key
from replicas.ranks import EngineAddress
from replicas.store import Store
from router.admin import AdminError
from router.authors import Name, Reason
from router.limits import FOR_ALL, Limits
from scheduler.messages import Telemetry

_LONGEST_SAID = 200
_AUTHOR = ("by", "key", "at_unix_s", "reason")
logger = logging.getLogger(__name__)


class SettingsUpdate(BaseModel):
    """settings: a change of the fields that it names, in the configuration's own form, such as {"targets": {"tpot_s":
    0.06}}; model: one model, or all when missing; by: the operator's name for itself; reason: why."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any]
    model: str | None = None
    by: Name = ""
    reason: Reason = ""


class Judge(Protocol):
    """Knows what settings may be (`cluster.live.SettingsJudge`)."""

    def changed(self, model_id: str, present: Settings, change: Mapping[str, Any]) -> dict[str, Any]:
        """The present settings with a change; ValueError with a sentence when they may not be."""

    def complete(self, settings: Settings) -> dict[str, Any]:
        """The settings with every default written out."""


class SettingsOffice:
    """Follows the settings in force, and keeps an operator's change of them.

    follow: called with the settings of all models whenever they differ from before.
    """

    def __init__(self, store: Store, judge: Judge, follow: Callable[[Mapping[str, Settings]], None]) -> None:
        self._store, self._judge, self._follow = store, judge, follow
        self._deployed: Mapping[str, Settings] = {}
        self._kept: dict[str, Any] = {}
        self.settings: dict[str, Settings] = {}
        self._keeping = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def deployed(self, models: Mapping[str, Settings]) -> None:
        """Follow newly deployed settings; changes of those before are forgotten."""
        self._deployed = models
        await self.look()
        for model_id, settings in models.items():
            if self._kept.get(model_id) is not None and self._author(model_id, settings) is None:
                with contextlib.suppress(Exception):  # without effect in any case
                    await asyncio.to_thread(self._store.delete, store_key(model_id))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._keep_looking())

    async def look(self) -> None:
        """Look for changes that another ingress keeps."""
        for model_id in self._deployed:
            with contextlib.suppress(Exception):  # the store is away: what was known last holds
                self._kept[model_id] = await asyncio.to_thread(self._store.get, store_key(model_id))
        wanted = {name: in_force(settings, self._kept.get(name)) for name, settings in self._deployed.items()}
        if wanted != self.settings:
            self.settings = wanted
            self._follow(wanted)

    def planned(self, update: SettingsUpdate, tenants: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        """The new settings of each model that an update changes. tenants: names that limits of keys may have.

        Raises:
            AdminError: 404 for an unknown model, 400 for settings that may not be.
        """
        if update.model is not None and update.model not in self.settings:
            known = ", ".join(self.settings) or "none"
            raise AdminError(404, f"model = {update.model[:200]!r} does not exist; the models are {known}")
        planned = {}
        for model_id in self.settings if update.model is None else (update.model,):
            try:
                new = self._judge.changed(model_id, self.settings[model_id], update.settings)
            except ValueError as error:
                raise AdminError(400, f"model {model_id}: {error}") from error
            changed = changes(self.complete(model_id), self._judge.complete(new))
            if changed:
                _check_limits(model_id, update, new, changed, tenants)
                planned[model_id] = new
        return planned

    def targets_after(self, update: SettingsUpdate, model_id: str) -> dict[str, Any]:
        """The targets of a model after an update of it.

        Raises:
            AdminError: as `planned` does.
        """
        new = self.planned(update).get(model_id, self.settings[model_id])
        return dict(self._judge.complete(new)["targets"])

    async def keep(
        self, update: SettingsUpdate, author: Mapping[str, Any], tenants: Sequence[str] = ()
    ) -> dict[str, dict[str, tuple[Any, Any]]]:
        """Keep a change for every process of the application and follow it here; old and new values by model.

        It is made to the settings that are in force now: another change, here or at another ingress, may have been kept
        since this one was planned.

        Raises:
            AdminError: as `planned` does.
            whatever the store raises; it may have some of the models' changes then.
        """
        async with self._keeping:
            await self.look()
            planned = self.planned(update, tenants)
            before = {model_id: self.complete(model_id) for model_id in planned}
            for model_id, settings in planned.items():
                change = kept_change(self._deployed[model_id], settings, **author)
                await asyncio.to_thread(self._store.put, store_key(model_id), change)
            await self.look()
        return {model_id: changes(before[model_id], self.complete(model_id)) for model_id in planned}

    def complete(self, model_id: str) -> dict[str, Any]:
        """The settings in force of a model, with every default."""
        return self._judge.complete(self.settings[model_id])

    def shown(self) -> dict[str, Any]:
        """Every model's settings in force, and who changed them since they were deployed (None: as deployed)."""
        return {
            model_id: {"settings": self.complete(model_id), "changed": self._author(model_id, deployed)}
            for model_id, deployed in self._deployed.items()
        }

    def _author(self, model_id: str, deployed: Settings) -> dict[str, Any] | None:
        kept = self._kept.get(model_id) or {}
        return None if in_force(deployed, kept) is deployed else {name: kept.get(name) for name in _AUTHOR}

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.look()
            except Exception:
                logger.exception("the settings could not be followed")


def changes(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """The old and the new value of what differs, by the path of its key: {"targets.tpot_s": (0.05, 0.06)}."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*old, *(key for key in new if key not in old)]:
            found |= changes(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if old == new else {path: (old, new)}


def _check_limits(
    model_id: str, update: SettingsUpdate, new: Settings, changed: Iterable[str], tenants: Sequence[str]
) -> None:
    """Check the limits that no model has of its own: they change for all, and those of keys are somebody's."""
    parts = (f"{path}.".split(".") for path in changed)
    for_all = {name for head, name, *_ in parts if head == "limits" and name in FOR_ALL}
    if for_all and update.model is not None:
        raise AdminError(
            400, f"model {model_id}: limits.{min(for_all)} is for all models; change it without naming a model"
        )
    if "keys" in for_all:
        for name, why in Limits.model_validate(new.get("limits", {})).wrong_holders(tenants).items():
            raise AdminError(400, f"limits.keys.{name[:_LONGEST_SAID]}: {why}")


def settings_event(model_id: str, changed: Mapping[str, tuple[Any, Any]], author: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the event of a change."""
    said = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())[:_LONGEST_SAID]
    return {
        "at_unix_s": author["at_unix_s"], "kind": "settings", "model": model_id, "by": author["by"],
        "key": author["key"], "reason": f"{said}; {author['reason']}" if author["reason"] else said,
        "old": {key: old for key, (old, _) in changed.items()}, "new": {key: new for key, (_, new) in changed.items()},
    }


def check_fits(
    planned: Mapping[str, Settings], engines: Mapping[str, EngineAddress],
    telemetry: Mapping[str, Telemetry | Exception],
) -> None:
    """Check new configured thresholds against the limits of each engine that answers."""
    for name, report in telemetry.items():
        if engines[name].model_id in planned and isinstance(report, Telemetry):
            try:
                engine_settings(planned[engines[name].model_id]).thresholds.check_fits(report.limits)
            except ValueError as error:
                raise AdminError(400, f"replica {name}: {error}") from error
