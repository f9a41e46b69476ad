"""The control endpoints over HTTP, for the command line."""

from __future__ import annotations

import os
from typing import Any

import httpx

from scheduler.config_errors import CommandFailed, UsageError

DEFAULT_URL = "http://127.0.0.1:8000"


class AdminUnavailable(CommandFailed):
    """No server answers at the URL; the message says how to start one."""


class AdminRejected(CommandFailed):
    """The server rejected the request; the message is the server's."""


class AdminClient:
    """GET and PUT on `/admin`; the API key comes from HEADRACE_API_KEY, as on the server."""

    def __init__(self, url: str) -> None:
        key = os.environ.get("HEADRACE_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._url = url.rstrip("/")
        try:
            self._client = httpx.Client(base_url=self._url, headers=headers, timeout=15.0, trust_env=False)
        except httpx.InvalidURL as error:
            raise AdminUnavailable(f"--url = {url!r} is not a URL: {error}; allowed: such as {DEFAULT_URL}") from error

    def state(self) -> dict[str, Any]:
        """`GET /admin/state`."""
        return self._ask("GET", "/admin/state")

    def overview(self) -> dict[str, Any]:
        """`GET /admin/overview`."""
        return self._ask("GET", "/admin/overview")

    def events(self) -> dict[str, Any]:
        """`GET /admin/events`."""
        return self._ask("GET", "/admin/events")

    def thresholds(self) -> dict[str, Any]:
        """`GET /admin/thresholds`."""
        return self._ask("GET", "/admin/thresholds")

    def settings(self) -> dict[str, Any]:
        """`GET /admin/settings`."""
        return self._ask("GET", "/admin/settings")

    def put_settings(self, body: dict[str, Any]) -> dict[str, Any]:
        """`PUT /admin/settings`."""
        return self._ask("PUT", "/admin/settings", body)

    def put_thresholds(self, body: dict[str, Any]) -> dict[str, Any]:
        """`PUT /admin/thresholds`."""
        return self._ask("PUT", "/admin/thresholds", body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise AdminUnavailable(
                f"nothing answers at {self._url} ({error}); start it with 'headrace up', or give --url"
            ) from error
        try:
            answer: Any = response.json()
        except ValueError as error:
            raise AdminRejected(f"{self._url} answered HTTP {response.status_code} and no JSON") from error
        if response.is_error:
            said = answer.get("error") if isinstance(answer, dict) else None
            message = said.get("message", response.text) if isinstance(said, dict) else response.text
            raise AdminRejected(f"HTTP {response.status_code}: {message}")
        if not isinstance(answer, dict):
            raise AdminRejected(f"{self._url} is not a Headrace application: {path} answers {response.text[:80]}")
        return answer


def nested(fields: dict[str, Any]) -> dict[str, Any]:
    """{"targets.tpot_s": 0.06} as {"targets": {"tpot_s": 0.06}}.

    Raises:
        UsageError: a field is given twice, as a whole and in parts.
    """
    found: dict[str, Any] = {}
    for path, value in fields.items():
        *holders, name = path.split(".")
        place = found
        for holder in holders:
            place = place.setdefault(holder, {})
            if not isinstance(place, dict):
                raise UsageError(f"{path} and {holder} are both given; give one of them")
        place[name] = value
    return found
