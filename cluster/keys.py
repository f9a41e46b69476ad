"""API keys on their way from the process that deploys to the ingress: as digests, so that Ray's records have no key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Any

from router.auth import API_KEY_FILE_VARIABLE, API_KEY_VARIABLE, Keyring
from router.tenants import TenantConfig

NOT_OPENED = (
    f"the running application asks for an API key, and this deployment has none: set {API_KEY_VARIABLE} or "
    f"{API_KEY_FILE_VARIABLE} as before, or pass --insecure to serve without one"
)


def with_keys(options: Mapping[str, Any], tenants: Sequence[TenantConfig]) -> dict[str, Any]:
    """Deployment options of the ingress, and in its environment the digests of the keys known here."""
    digests = Keyring(tenants).digests()
    if not digests:
        return dict(options)
    actor = dict(options.get("ray_actor_options") or {})
    environment = dict(actor.get("runtime_env") or {})
    environment["env_vars"] = environment.get("env_vars", {}) | digests
    return dict(options) | {"ray_actor_options": actor | {"runtime_env": environment}}


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
