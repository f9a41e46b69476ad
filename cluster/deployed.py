"""What is deployed, in short, and what a new deployment changes, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.config import AppConfig
from cluster.live import complete_settings, live_settings
from cluster.settings import ModelSettings
from replicas.live_settings import in_force, store_key
from replicas.store import Store
from router.auth import DIGEST_SUFFIX, Keyring
from router.live_settings import changes

_KEY = "deployed"
NOTHING = "nothing changed"
_INGRESS = "ingress"
Deployed = dict[str, Any]


def deployed(args: AppConfig, versions: Mapping[str, str]) -> Deployed:
    """What a deployment of `args` consists of. versions: of the ingress ("") and of each engine, by its model."""
    models = {}
    for entry in args.llm_configs:
        settings = args.settings_of(entry.model_id)
        scale = entry.deployment_config.get("autoscaling_config") or entry.deployment_config.get("num_replicas", 1)
        models[entry.model_id] = {
            "version": versions[entry.model_id], "replicas": scale, "live": live_settings(settings),
            "settings": complete_settings(settings),
        }
    tenants = {tenant.name: tenant.model_dump(mode="json") for tenant in args.headrace.tenants}
    keys = Keyring(args.headrace.tenants)
    return {
        "models": models, "tenants": tenants, _INGRESS: versions[""], "keys": keys.digests(), "is_open": keys.is_open,
    }


def note(store: Store, new: Deployed) -> None:
    """Remember what is deployed now; what operators changed of the settings before counts no more."""
    store.put(_KEY, new)
    for model_id in new["models"]:
        store.delete(store_key(model_id))


def whats_new(store: Store, new: Deployed) -> list[str]:
    """What `new` changes of what is deployed and of what operators changed since, a line each; [] when not known."""
    old = store.get(_KEY)
    return list(_differences(store, old, new)) or [NOTHING] if isinstance(old, dict) else []


def opens(store: Store, new: Deployed) -> bool:
    """Whether `new` asks for no API key although what is deployed now does."""
    old = store.get(_KEY)
    return isinstance(old, dict) and not old.get("is_open", True) and bool(new["is_open"])


def _differences(store: Store, old: Deployed, new: Deployed) -> Iterator[str]:
    for model_id in old["models"].keys() | new["models"].keys():
        before, after = old["models"].get(model_id), new["models"].get(model_id)
        if before is None or after is None:
            yield f"{model_id}: {'new' if before is None else 'gone'}"
            continue
        if before["version"] != after["version"]:
            yield f"{model_id}: another engine, its replicas are replaced one by one"
        for key, (was, now) in changes(before["replicas"], after["replicas"], "replicas").items():
            yield f"{model_id}: {key} {was} -> {now}"
        kept = store.get(store_key(model_id))
        held = in_force(before["live"], kept)
        present = before["settings"]
        if held is not before["live"]:
            present = complete_settings(ModelSettings.model_validate(held))
        for key, (was, now) in changes(present, after["settings"]).items():
            yield f"{model_id}: {key} {was} -> {now}"
    for name, (was, now) in changes(old["tenants"], new["tenants"], "tenants").items():
        yield f"{name} {was} -> {now}"
    keys = changes(old.get("keys", {}), new["keys"])
    for name, (_, now) in keys.items():
        yield f"{name.removesuffix(DIGEST_SUFFIX)}: {'no API key any more' if now is None else 'another API key'}"
    if old[_INGRESS] != new[_INGRESS] or keys:
        yield "the ingress is replaced"
