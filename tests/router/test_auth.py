"""Where API keys come from, and what each of them allows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.keys import is_loopback, require_key_beyond_loopback, with_keys
from router import auth
from router.auth import ANONYMOUS, API_KEY_FILE_VARIABLE, API_KEY_VARIABLE, OPERATOR, Keyring
from router.refusal import Refusal
from router.tenants import TenantConfig, sign

KEY = "sk-of-this-test"
RED, BLUE = TenantConfig(name="red", weight=3, api_key_env="KEY_OF_RED"), TenantConfig(
    name="blue", api_key_env="KEY_OF_BLUE")


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (API_KEY_VARIABLE, API_KEY_FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KEY_OF_RED", "sk-red")
    monkeypatch.setenv("KEY_OF_BLUE", "sk-blue")


def user(ring: Keyring, key: str | None) -> str | None:
    """Whose key it is; None: refused."""
    headers = {} if key is None else {b"authorization": f"Bearer {key}".encode()}
    try:
        return ring.require_user(headers).name
    except Refusal as refusal:
        assert refusal.status == 401 and (not key or key not in refusal.message)
        return None


def operates(ring: Keyring, key: str | None) -> bool:
    try:
        ring.require_operator({} if key is None else {b"authorization": f"Bearer {key}".encode()})
    except Refusal:
        return False
    return True


def test_without_a_configured_key_all_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        if value is not None:
            monkeypatch.setenv(API_KEY_VARIABLE, value)
        assert Keyring().is_open and user(Keyring(), None) == ANONYMOUS and operates(Keyring(), "anything")


@pytest.mark.parametrize("header", [
    b"", KEY.encode(), b"Bearer", b"Bearer ", b"Bearer wrong", b"Bearer %sx" % KEY.encode(),
    b"Bearer %s" % KEY[:-1].encode(), b"Basic %s" % KEY.encode(), b"Bearer %s" % KEY.upper().encode(), b"Bearer \xe9",
])
def test_only_the_key_itself_opens(monkeypatch: pytest.MonkeyPatch, header: bytes) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    ring = Keyring()
    for require in (ring.require_user, ring.require_operator):
        with pytest.raises(Refusal, match="Authorization: Bearer KEY"):
            require({b"authorization": header})
        require({b"authorization": b"bearer %s" % KEY.encode()})


def test_tenants_may_use_and_only_the_operator_may_operate(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Keyring([RED, BLUE])
    assert not ring.is_open
    assert [user(ring, key) for key in ("sk-red", "sk-blue", "sk-green", "", None)] == ["red", "blue", None, None, None]
    assert not operates(ring, "sk-red") and not operates(ring, None), "with tenants and no operator's key it is shut"
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    assert user(ring, KEY) == OPERATOR and operates(ring, KEY) and not operates(ring, "sk-red")
    monkeypatch.delenv("KEY_OF_RED")
    assert user(ring, "") is user(ring, "sk-red") is None, "a key that is not set opens nothing"


def test_a_request_is_signed_whatever_the_client_wrote() -> None:
    body = SimpleNamespace(vllm_xargs={"headrace_tenant": "forged", "headrace_turned_away": 10**6, "mine": 1})
    sign(body, RED, 4)
    ours = {"headrace_tenant": "red", "headrace_weight": 3.0, "headrace_turned_away": 4}
    assert body.vllm_xargs == {"mine": 1} | ours
    sign(body, None)
    assert body.vllm_xargs == {"mine": 1}


def test_a_key_in_a_file_is_read_again_and_a_missing_file_opens_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = [0.0]
    monkeypatch.setattr(auth.time, "monotonic", lambda: clock[0])
    operators, greens = tmp_path / "operator", tmp_path / "green"
    monkeypatch.setenv(API_KEY_FILE_VARIABLE, str(operators))
    ring = Keyring([TenantConfig(name="green", api_key_file=str(greens))])
    assert not ring.is_open and user(ring, None) is None and not operates(ring, None)
    operators.write_text(f"{KEY}\n")
    greens.write_text("sk-green\n")
    assert (user(ring, KEY), user(ring, "sk-green")) == (OPERATOR, "green")
    operators.write_text("sk-newer")
    clock[0] += 2.0
    assert (user(ring, KEY), user(ring, "sk-newer")) == (None, OPERATOR)
    operators.write_text("")
    clock[0] += 2.0
    assert user(ring, "") is user(ring, "sk-newer") is None


def test_keys_travel_as_digests_and_are_known_by_them_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "green").write_text("sk-green")
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    tenants = [RED, TenantConfig(name="green", api_key_file=str(tmp_path / "green"))]
    options = with_keys({"num_replicas": 2, "ray_actor_options": {"num_cpus": 1}}, tenants)
    assert not [key for key in (KEY, "sk-red", "sk-green") if key in repr(options)]
    sent = options["ray_actor_options"]["runtime_env"]["env_vars"]
    assert sent[f"{API_KEY_VARIABLE}_SHA256"] == hashlib.sha256(KEY.encode()).hexdigest() and len(sent) == 3
    assert options["num_replicas"] == 2 and options["ray_actor_options"]["num_cpus"] == 1
    (tmp_path / "green").unlink()
    monkeypatch.setattr(auth, "_SEEN", set())  # as in another process
    monkeypatch.delenv("KEY_OF_RED")
    monkeypatch.setenv(API_KEY_VARIABLE, "sk-of-the-node")
    for name, digest in sent.items():
        monkeypatch.setenv(name, digest)
    ring = Keyring(tenants)
    assert [user(ring, key) for key in (KEY, "sk-red", "sk-green")] == [OPERATOR, "red", "green"]
    assert user(ring, "sk-of-the-node") is None, "what was deployed is newer"
    assert user(ring, sent[f"{API_KEY_VARIABLE}_SHA256"]) is None, "a digest is no key"


def test_a_file_that_was_here_and_is_gone_opens_nothing_though_its_digest_was_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock, green = [0.0], tmp_path / "green"
    monkeypatch.setattr(auth.time, "monotonic", lambda: clock[0])
    green.write_text("sk-green")
    tenants = [TenantConfig(name="green", api_key_file=str(green))]
    for name, digest in Keyring(tenants).digests().items():
        monkeypatch.setenv(name, digest)
    assert user(Keyring(tenants), "sk-green") == "green"
    green.unlink()
    clock[0] += 2.0
    assert user(Keyring(tenants), "sk-green") is None, "also with a keyring that is made anew, as settings change"
    green.write_text("sk-newer")
    clock[0] += 2.0
    assert [user(Keyring(tenants), key) for key in ("sk-green", "sk-newer")] == [None, "green"]


def test_a_file_that_may_not_be_looked_for_counts_as_one_on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", forbidden)
    tenants = [TenantConfig(name="green", api_key_file="/forbidden/green")]
    assert user(Keyring(tenants), "sk-green") is None
    (name,) = Keyring(tenants).digests()
    monkeypatch.setenv(name, hashlib.sha256(b"sk-green").hexdigest())
    assert user(Keyring(tenants), "sk-green") == "green"


def test_without_keys_nothing_is_passed_on() -> None:
    assert with_keys({"num_replicas": 1}, ()) == {"num_replicas": 1}


@pytest.mark.parametrize(("host", "loopback"), [
    ("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
    ("10.0.0.7", False), ("gpu-1", False), ("", False),
])
def test_beyond_loopback_a_key_is_needed(monkeypatch: pytest.MonkeyPatch, host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
    wrong = require_key_beyond_loopback(host, ())
    assert wrong is None if loopback else wrong is not None and "--insecure" in wrong and repr(host) in wrong
    assert require_key_beyond_loopback(host, [RED]) is None
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    assert require_key_beyond_loopback(host, ()) is None


def test_a_tenant_has_one_key() -> None:
    for both in ({}, {"api_key_env": "A", "api_key_file": "/a"}):
        with pytest.raises(ValueError, match="api_key_env or api_key_file"):
            TenantConfig(name="x", **both)
