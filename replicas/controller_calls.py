"""The way from a replica to the application's controller, a named Ray actor."""

from __future__ import annotations

import asyncio
from typing import Any

import ray

NAMESPACE = "headrace"
_ANSWER_S = 5.0


def controller_name(app_name: str) -> str:
    """The actor name of an application's controller, in the namespace `NAMESPACE`."""
    return f"controller:{app_name}"


class ToController:
    """Sends the reports of one replica of a deployment."""

    def __init__(self, app_name: str, deployment: str) -> None:
        self._name, self._deployment = controller_name(app_name), deployment
        self._actor: Any = None

    async def __call__(self, reports: dict[str, bytes], urgent: bool) -> dict[str, Any]:
        """The controller's answer; see `cluster.inbox.wishes`.

        Raises:
            Exception: there is no controller, or it does not answer within five seconds; one may be there next time.
        """
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(ray.get_actor, self._name, namespace=NAMESPACE)
            reference = self._actor.report.remote(self._deployment, reports, urgent)
            answer: dict[str, Any] = await asyncio.wait_for(asyncio.wrap_future(reference.future()), _ANSWER_S)
        except BaseException:
            self._actor = None
            raise
        return answer
