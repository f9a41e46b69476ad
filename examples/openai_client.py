"""Ask a running server with the openai client: stream the output, declare its length, retry when rejected.

    python examples/openai_client.py "Write a sentence about the sea."

The openai client retries by itself after a 429 (`max_retries`); this script shows the steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

from openai import OpenAI, RateLimitError

ATTEMPTS = 3


def stream(client: OpenAI, model: str, prompt: str, *, expected_output_tokens: int, most: int = 200) -> Iterator[str]:
    """The answer, piece by piece. The expected length is a hint for the scheduler; `most` is the bound."""
    chunks = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=most, stream=True,
        extra_body={"expected_output_tokens": expected_output_tokens},
    )
    for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


def ask(
    client: OpenAI, model: str, prompt: str, *, expected_output_tokens: int, show: Callable[[str], object],
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Pass the answer to `show`; after a rejection wait as long as the server says, `ATTEMPTS` times in all.

    A request is rejected (HTTP 429) before its first token or not at all, so that nothing is shown twice.

    Raises:
        RateLimitError: the last attempt was rejected too.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            for piece in stream(client, model, prompt, expected_output_tokens=expected_output_tokens):
                show(piece)
            return
        except RateLimitError as error:
            if attempt == ATTEMPTS:
                raise
            sleep(float(error.response.headers.get("Retry-After", 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none", help="the server's HEADRACE_API_KEY, if it has one")
    parser.add_argument("--expected-output-tokens", type=int, default=40)
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key=args.api_key, max_retries=0)
    model = client.models.list().data[0].id
    ask(
        client, model, args.prompt, expected_output_tokens=args.expected_output_tokens,
        show=lambda piece: print(piece, end="", flush=True),
    )
    print()


if __name__ == "__main__":
    main()
