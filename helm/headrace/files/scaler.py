"""Hands the numbers of replicas that KEDA wants to Ray Serve's scaling API: beside Ray's head, for ever.

KEDA scales a Kubernetes Deployment for each model; its `scale` is what KEDA wants. The standard library only.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote

ACCOUNT = Path(os.environ.get("ACCOUNT_FOLDER", "/var/run/secrets/kubernetes.io/serviceaccount"))
KUBERNETES = os.environ.get("KUBERNETES_API", "https://kubernetes.default.svc")
RAY = os.environ.get("RAY_DASHBOARD", "http://127.0.0.1:8265")
RAY_TOKEN = os.environ.get("RAY_AUTH_TOKEN", "")
PERIOD_S = float(os.environ.get("PERIOD_S", "5"))
APPLICATION = "headrace"


def ask(url: str, body: dict | None = None, token: str = "", authority: str | None = None) -> dict:
    """A JSON answer; GET, or POST with a body."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    context = ssl.create_default_context(cafile=authority) if authority else None
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=10, context=context) as answer:
        return json.loads(answer.read() or b"{}")


def wanted(namespace: str, name: str) -> int:
    """What KEDA wants: the replicas of the Deployment that stands for a model."""
    authority = ACCOUNT / "ca.crt"
    scale = ask(
        f"{KUBERNETES}/apis/apps/v1/namespaces/{namespace}/deployments/{name}/scale",
        token=(ACCOUNT / "token").read_text(),  # read again, as Kubernetes renews it
        authority=str(authority) if authority.exists() else None,
    )
    return int(scale["spec"].get("replicas", 0))


def present() -> dict[str, int]:
    """What Ray Serve aims at, by deployment."""
    application = ask(f"{RAY}/api/serve/applications/", token=RAY_TOKEN)["applications"].get(APPLICATION, {})
    return {name: int(one["target_num_replicas"]) for name, one in application.get("deployments", {}).items()}


def step(namespace: str, targets: dict[str, str]) -> None:
    """Change what differs. targets: Ray Serve's deployment by the name of the Kubernetes Deployment."""
    have = present()
    for name, deployment in targets.items():
        number = wanted(namespace, name)
        if deployment in have and have[deployment] != number:
            path = f"/api/v1/applications/{APPLICATION}/deployments/{quote(deployment, safe='')}/scale"
            ask(f"{RAY}{path}", {"target_num_replicas": number}, RAY_TOKEN)
            print(f"{deployment}: {have[deployment]} -> {number} replicas", flush=True)


def main() -> None:
    """Follow for ever; what fails is said once and tried again."""
    namespace, targets = os.environ["NAMESPACE"], json.loads(Path(sys.argv[1]).read_text())
    said = ""
    while True:
        try:
            step(namespace, targets)
            said = ""
        except (OSError, ValueError, KeyError) as error:
            if str(error) != said:
                print(f"not followed: {error}", flush=True)
            said = str(error)
        time.sleep(PERIOD_S)


if __name__ == "__main__":
    main()
