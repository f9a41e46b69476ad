"""API keys on their way from the process that deploys to the ingress: as digests, so that no key is in Ray's records."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

from router.auth import API_KEY_FILE_VARIABLE, API_KEY_VARIABLE, Keyring
from router.tenants import TenantConfig


def keys_for_the_ingress(tenants: Sequence[TenantConfig]) -> dict[str, Any]:
    """Ray actor options with the digests of the keys known here; {} if there are none."""
    digests = Keyring(tenants).digests()
    return {"runtime_env": {"env_vars": digests}} if digests else {}


def require_key_beyond_loopback(host: str, tenants: Sequence[TenantConfig]) -> str | None:
    """What is wrong with serving at `host`, in words; None if only this machine reaches it or a key is asked for."""
    if is_loopback(host) or not Keyring(tenants).is_open:
        return None
    return (
        f"http_options.host = {host!r} is reached from other machines, and there is no API key: set {API_KEY_VARIABLE} "
        f"or {API_KEY_FILE_VARIABLE}, or pass --insecure to serve without one"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at this address or name."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
