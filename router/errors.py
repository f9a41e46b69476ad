"""Errors in OpenAI's form. The fence around the one non-public name of Ray Serve LLM that carries them."""

from __future__ import annotations

from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException


def bad_request(message: str) -> OpenAIHTTPException:
    """HTTP 400 with an OpenAI-style body, to be raised from an ingress method."""
    return OpenAIHTTPException(status_code=400, message=message, type="invalid_request_error")
