"""The active thresholds of one engine, and the acceptance or rejection of offered ones.

Offers come from the channel's thread; the scheduler reads `current` at the start of every iteration. A change swaps one
reference, so it is atomic and takes effect with the next iteration.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from scheduler.messages import Ack, Apply
from scheduler.policies import Policy, make_policy
from scheduler.support import EngineSetup, UnsupportedSetting, require_supported
from scheduler.thresholds import EngineLimits, InvalidThresholds, Thresholds


@dataclass(frozen=True, slots=True)
class Active:
    """Thresholds, the policy object they made, and the clock second at which they lapse (None: never)."""

    thresholds: Thresholds
    policy: Policy
    lapses_at_s: float | None
    from_config: bool


class ActiveThresholds:
    """Accepts newer, valid, fitting thresholds; falls back to the configured ones when the latest are not renewed.

    setup: the engine settings that some policies do not support; policy_of: makes the policy object of thresholds.

    Raises:
        InvalidThresholds: from the constructor, when the configured thresholds do not fit the engine.
        UnsupportedSetting: likewise, when their policy does not support an engine setting.
    """

    def __init__(
        self, configured: Thresholds, limits: EngineLimits, clock: Callable[[], float], *, allow_strict: bool = False,
        setup: EngineSetup | None = None, policy_of: Callable[[Thresholds], Policy] = make_policy,
    ) -> None:
        self.limits = limits
        self._policy_of = policy_of
        self._allow_strict = allow_strict
        self._setup = setup or EngineSetup()
        self._clock = clock
        self._lock = threading.Lock()
        self._check(configured, self._setup)
        self._configured = configured
        # Made once, so that a lapse costs the engine's loop nothing.
        self._configured_policy = self._policy_of(configured)
        self._current = Active(configured, self._configured_policy, None, from_config=True)

    def current(self) -> Active:
        """The thresholds and policy of the next iteration."""
        current = self._current
        if current.lapses_at_s is not None and self._clock() >= current.lapses_at_s:
            current = self._lapse(current)
        return current

    def offer(self, apply: Apply) -> Ack:
        """Make thresholds active, or answer why not."""
        with self._lock:
            now = self._current_locked()
            active = now.thresholds
            offered = apply.thresholds
            if offered.version == 0:
                offered = offered.with_version(active.version + 1)
            rejection = self._rejection(offered, active, apply.automatic)
            if rejection:
                return rejection
            lapses = None if offered.valid_for_s is None else self._clock() + offered.valid_for_s
            # The same rule keeps its policy object, and with it the state of its holds.
            policy = now.policy if offered.same_rule(active) else self._policy_of(offered)
            self._current = Active(offered, policy, lapses, from_config=False)
            return Ack(accepted=True, active_version=offered.version, reason=offered.reason)

    def configure(self, configured: Thresholds, setup: EngineSetup) -> None:
        """Replace the configured thresholds. They are active at once, under the next version, unless a pin holds.

        The next version makes a push that is under way stale: it was solved for the settings before.

        Raises:
            InvalidThresholds, UnsupportedSetting: as the constructor; nothing has changed then.
        """
        with self._lock:
            self._check(configured, setup)
            self._setup = setup
            if configured == self._configured:
                return
            now = self._current_locked()
            self._configured, self._configured_policy = configured, self._policy_of(configured)
            if now.from_config or not now.thresholds.pinned:
                policy = now.policy if configured.same_rule(now.thresholds) else self._configured_policy
                version = now.thresholds.version + 1
                self._current = Active(configured.with_version(version), policy, None, from_config=True)

    def _current_locked(self) -> Active:
        current = self._current
        if current.lapses_at_s is not None and self._clock() >= current.lapses_at_s:
            current = self._current = self._fallback(current)
        return current

    def _lapse(self, lapsed: Active) -> Active:
        with self._lock:
            if self._current is lapsed:
                self._current = self._fallback(lapsed)
            return self._current

    def _fallback(self, lapsed: Active) -> Active:
        # Versions never decrease, or a late duplicate of lapsed thresholds would look new.
        configured = self._configured.with_version(lapsed.thresholds.version)
        return Active(configured, self._configured_policy, None, from_config=True)

    def _rejection(self, offered: Thresholds, active: Thresholds, automatic: bool) -> Ack | None:
        def reject(code: Literal["stale", "pinned", "invalid"], reason: str) -> Ack:
            return Ack(accepted=False, active_version=active.version, reason=reason, code=code)

        if offered.version <= active.version:
            reason = f"version {offered.version} is not newer than the active version {active.version}"
            return reject("stale", reason)
        if automatic and active.pinned:
            reason = f"version {active.version} is pinned by an operator; lift the pin to resume automatic tuning"
            return reject("pinned", reason)
        try:
            self._check(offered, self._setup)
        except (InvalidThresholds, UnsupportedSetting) as error:
            return reject("invalid", str(error))
        return None

    def _check(self, thresholds: Thresholds, setup: EngineSetup) -> None:
        thresholds.check_fits(self.limits)
        if not self._allow_strict:
            thresholds.check_serves()
        require_supported(setup, thresholds)
