"""A model server that answers at once, and a local Ray Serve for it: for benchmarks of what stands in front."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from cluster.ray_environment import prepare


def fake_server(**options: Any) -> Any:
    """A bound deployment whose `chat` answers one word. The class is local, so that Ray carries it by value."""
    from ray import serve
    from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionResponse

    class Fake:
        async def chat(self, body: Any, raw: Any = None) -> Any:
            message = {"role": "assistant", "content": "ok"}
            yield ChatCompletionResponse(
                id="x", object="chat.completion", created=1, model=body.model,
                choices=[{"index": 0, "finish_reason": "stop", "message": message}],
                usage={"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            )

    return serve.deployment(Fake, name="Fake", max_ongoing_requests=1000, **options).bind()


def model_card(name: str) -> Any:
    """What an OpenAI ingress says of the fake model."""
    from ray.llm._internal.serve.core.configs.openai_api_models import ModelCard

    return ModelCard(id=name, object="model", owned_by="t", permission=[], metadata={})


@contextlib.contextmanager
def local_serve(port: int, *, with_haproxy: bool = True) -> Iterator[None]:
    """A Ray of its own with Serve at this port of 127.0.0.1, stopped at the end."""
    prepare(local=True, with_haproxy=with_haproxy)
    import ray
    from ray import serve

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
