"""Joining a Ray cluster that runs already."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def use_the_user_s_token() -> None:
    """Show the cluster the user's token, where there is one.

    Once this user has started a local Ray (`headrace up`, `ray.init()`), there is one in ~/.ray/auth_token, and every
    cluster that the user starts asks for it; but Ray shows it to a cluster at a given address only when told to.
    A cluster that asks for none ignores it.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def why_not_joined(address: str, error: Exception) -> str:
    """What is wrong with a cluster that could not be joined, and what to do."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit() and not _listens(host, int(port)):
        return (
            f"nothing listens at ray.address = {address}; start a cluster there with 'ray start --head --port {port}', "
            "or set ray.address in the configuration"
        )
    if not port.isdigit():
        return (
            f"no Ray cluster is found with ray.address = {address}: {error}; start one with 'ray start --head', or set "
            "ray.address to HOST:PORT"
        )
    return (
        f"a server listens at ray.address = {address} but does not let this process join: {_token_in_words()}; "
        "or it is no Ray cluster, or runs another version of Ray"
    )


def is_refusal(error: Exception) -> bool:
    """Whether Ray has raised this because a cluster cannot be joined."""
    return isinstance(error, ConnectionError) or type(error).__name__ == "AuthenticationError"


def _token_in_words() -> str:
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']} is set; if the cluster asks for a token, unset it"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "its token may not be the one in RAY_AUTH_TOKEN"
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if file.exists():
        return f"its token may not be the one in {file}; put the cluster's own there, or into RAY_AUTH_TOKEN"
    return f"it may ask for a token: copy ~/.ray/auth_token from its head node to {file}, or set RAY_AUTH_TOKEN"


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=3.0):
            return True
    except OSError:
        return False
