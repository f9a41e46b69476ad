"""The requests in flight through one ingress, and the turning away of new ones once the application stops."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException

from scheduler.rejection import Kind, Rejection

_RETRY_AFTER_S = 10.0


class InFlight:
    """Counts requests from their arrival to the end of their answer."""

    def __init__(self) -> None:
        self.count = 0
        self.is_closed = False

    def close(self) -> None:
        """Turn new requests away from now on."""
        self.is_closed = True

    @contextlib.contextmanager
    def request(self, request_id: str) -> Iterator[None]:
        """One request is in flight.

        Raises:
            OpenAIHTTPException: HTTP 503 with a time to retry, once closed.
        """
        if self.is_closed:
            stopping = Rejection.for_drain_time("the server is stopping", _RETRY_AFTER_S, request_id, Kind.RECALLED)
            raise OpenAIHTTPException(
                status_code=stopping.kind.http_status, message=stopping.as_json(), type="server_error"
            )
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1
