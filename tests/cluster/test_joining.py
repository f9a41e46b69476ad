"""A cluster that cannot be joined: what is wrong, and what to do; and the token that the user already has."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.joining import is_refusal, use_the_user_s_token, why_not_joined

REFUSED = ConnectionError("Failed to connect to Ray cluster")


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_where_nothing_listens_that_is_said(scheme: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = why_not_joined(f"{scheme}127.0.0.1:{port}", REFUSED)
    assert said.startswith(f"nothing listens at ray.address = {scheme}127.0.0.1:{port}; start a cluster")


def test_without_a_token_it_says_where_to_get_one(listening: str, home: Path) -> None:
    said = why_not_joined(listening, REFUSED)
    assert f"copy ~/.ray/auth_token from its head node to {home}/.ray/auth_token" in said


def test_with_a_token_that_is_not_taken_it_names_the_file_or_the_variable(
    listening: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("x")
    assert f"may not be the one in {home}/.ray/auth_token" in why_not_joined(listening, REFUSED)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    said = why_not_joined(listening, REFUSED)
    assert "may not be the one in RAY_AUTH_TOKEN" in said and "secret" not in said
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "RAY_AUTH_MODE=disabled is set" in why_not_joined(listening, REFUSED)


def test_auto_that_finds_nothing_names_the_other_forms() -> None:
    assert "set ray.address to HOST:PORT" in why_not_joined("auto", REFUSED)


def test_only_a_refusal_is_explained() -> None:
    from ray.exceptions import AuthenticationError, RaySystemError

    assert is_refusal(REFUSED) and is_refusal(AuthenticationError("no token"))
    assert not is_refusal(ValueError()) and not is_refusal(RaySystemError("x"))


def test_ray_shows_a_token_to_a_given_address_only_when_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import worker
    from ray._private.authentication import authentication_token_setup as setup

    ours, _, then = inspect.getsource(worker.init).partition('if address in (None, "auto"):')
    assert then.lstrip().startswith("maybe_enable_token_auth_if_token_available(") and ours
    assert list(inspect.signature(setup.maybe_enable_token_auth_if_token_available).parameters) == ["warn_if_disabled"]
    asked: list[bool] = []
    monkeypatch.setattr(
        setup, "maybe_enable_token_auth_if_token_available", lambda warn_if_disabled: asked.append(warn_if_disabled)
    )
    use_the_user_s_token()
    assert asked == [False]
