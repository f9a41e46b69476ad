"""The chart's keys: in Secrets and nowhere else, yours, inline or generated."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from chart_examples import API_KEY, CI, EVERYTHING, HF_TOKEN, Values
from chart_render import containers, environment, objects, of_kind, ray_service, reference
from fake_kubernetes import installed, owned
from helm_python import Chart, HelmError, HelmRenderError, HelmValuesError

OPEN = {"authentication": {"enabled": False}}


def test_ray_s_ports_ask_for_a_token_that_kuberay_gives_to_the_pods(chart: Chart) -> None:
    cluster = ray_service(chart)["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "demo-headrace-auth"}
    theirs = ray_service(chart, CI["existing-secrets"])["spec"]["rayClusterConfig"]
    assert theirs["authOptions"] == {"mode": "token", "secretName": "llm-ray"}
    assert of_kind(objects(chart, CI["existing-secrets"]), "Secret") == [], "every key is in a Secret of somebody else"
    for container in containers(ray_service(chart)):
        assert "RAY_AUTH_MODE" not in environment(container), "KubeRay's to set"
    without = ray_service(chart, {"ray": OPEN})
    assert "authOptions" not in without["spec"]["rayClusterConfig"]
    for container in containers(without):
        assert environment(container)["RAY_AUTH_MODE"] == "disabled", "else by what lies in the image"


def secrets_of(container: dict[str, Any]) -> dict[str, Any]:
    return {name: place for name, place in environment(container).items() if isinstance(place, dict)}


def test_without_keys_no_pod_reads_a_secret(chart: Chart) -> None:
    values = {"auth": {"generateApiKey": False}, "ray": OPEN}
    assert of_kind(objects(chart, values), "Secret") == []
    for container in containers(ray_service(chart, values)):
        assert secrets_of(container) == {}


def test_a_key_of_the_operator_is_generated_long_and_never_the_same(chart: Chart) -> None:
    first, second = (of_kind(objects(chart), "Secret")[0]["data"] for _ in range(2))
    assert first.keys() == {"api-key", "auth_token"}
    for entry in first:
        assert first[entry] != second[entry] and len(base64.b64decode(first[entry])) == 43
    for container in containers(ray_service(chart)):
        assert secrets_of(container) == {"HEADRACE_API_KEY": reference("demo-headrace-auth", "api-key")}


def test_a_tenant_without_a_secret_has_a_generated_key(chart: Chart) -> None:
    tenants = [{"name": "team a"}, {"name": "b", "secretName": "theirs", "secretKey": "k"}]
    values = {"tenants": tenants, "auth": {"existingSecret": "team-keys"}}
    manifests = objects(chart, values)
    (secret,) = of_kind(manifests, "Secret")
    assert secret["data"].keys() == {"tenant-team-a", "auth_token"}
    (service,) = of_kind(manifests, "RayService")
    for container in containers(service):
        places = secrets_of(container)
        assert places["HEADRACE_TENANT_KEY_0"] == reference("demo-headrace-auth", "tenant-team-a")
        assert places["HEADRACE_TENANT_KEY_1"] == reference("theirs", "k")
        assert places["HEADRACE_API_KEY"] == reference("team-keys", "api-key")


def test_generated_keys_stay_where_they_are_in_the_cluster() -> None:
    there = {"api-key": "the-operator-s", "tenant-a": "the-tenant-s", "auth_token": "ray-s", "hf-token": "old"}
    values = {"tenants": [{"name": "a"}, {"name": "new"}]}
    secret = owned("v1", "Secret", "demo-headrace-auth", data=encoded(there))
    manifests = installed({"/api/v1/namespaces/llm/secrets/demo-headrace-auth": secret}, values)
    (secret,) = of_kind(manifests, "Secret")
    found = {key: base64.b64decode(text).decode() for key, text in secret["data"].items()}
    assert {key: found.pop(key) for key in ("api-key", "tenant-a", "auth_token")}.items() <= there.items()
    assert found.keys() == {"tenant-new"} and len(found["tenant-new"]) == 43


def encoded(entries: dict[str, str]) -> dict[str, str]:
    return {key: base64.b64encode(text.encode()).decode() for key, text in entries.items()}


@pytest.mark.parametrize(
    ("auth", "variables"),
    [
        ({"hfToken": HF_TOKEN}, {"HF_TOKEN": ("hf-token", HF_TOKEN)}),
        ({"apiKey": API_KEY}, {"HEADRACE_API_KEY": ("api-key", API_KEY)}),
        (
            {"hfToken": HF_TOKEN, "apiKey": API_KEY},
            {"HF_TOKEN": ("hf-token", HF_TOKEN), "HEADRACE_API_KEY": ("api-key", API_KEY)},
        ),
    ],
    ids=["token", "key", "both"],
)
def test_inline_keys_make_a_secret_that_pods_refer_to(
    chart: Chart, auth: Values, variables: dict[str, tuple[str, str]]
) -> None:
    manifests = objects(chart, {"auth": auth | {"generateApiKey": False}, "ray": OPEN})
    (secret,) = of_kind(manifests, "Secret")
    assert secret["metadata"]["name"] == "demo-headrace-auth"
    assert {key: base64.b64decode(value).decode() for key, value in secret["data"].items()} == dict(variables.values())
    (service,) = of_kind(manifests, "RayService")
    for container in containers(service):
        assert secrets_of(container) == {
            name: reference("demo-headrace-auth", key) for name, (key, _) in variables.items()
        }


def test_existing_secret_is_referred_to_and_not_created(chart: Chart) -> None:
    manifests = objects(chart, {"auth": {"existingSecret": "team-keys"}, "ray": OPEN})
    assert of_kind(manifests, "Secret") == []
    (service,) = of_kind(manifests, "RayService")
    for container in containers(service):
        variables = environment(container)
        assert variables["HF_TOKEN"] == reference("team-keys", "hf-token")
        assert variables["HEADRACE_API_KEY"] == reference("team-keys", "api-key")


def test_existing_secret_with_its_own_entry_names(chart: Chart) -> None:
    auth = {"existingSecret": "team-keys", "existingSecretKeys": {"hfToken": "", "apiKey": "openai.key"}}
    for container in containers(ray_service(chart, {"auth": auth})):
        variables = environment(container)
        assert "HF_TOKEN" not in variables
        assert variables["HEADRACE_API_KEY"] == reference("team-keys", "openai.key")


@pytest.mark.parametrize("inline", ["hfToken", "apiKey"])
def test_inline_key_beside_an_existing_secret_is_rejected(chart: Chart, inline: str) -> None:
    with pytest.raises(HelmRenderError, match="auth.existingSecret excludes") as error:
        chart.render({"auth": {"existingSecret": "team-keys", inline: API_KEY}})
    assert API_KEY not in str(error.value)


def test_keys_stand_nowhere_but_in_the_secrets_data(chart: Chart) -> None:
    rendered = chart.render(EVERYTHING, name="demo", namespace="llm")
    for path, text in rendered.items():
        for key in (HF_TOKEN, API_KEY):
            assert key not in text, path
    for manifest in objects(chart, EVERYTHING):
        if manifest["kind"] == "Secret":
            del manifest["data"]
        for key in (HF_TOKEN, API_KEY):
            assert base64.b64encode(key.encode()).decode() not in json.dumps(manifest)


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HEADRACE_API_KEY"])
def test_key_as_a_plain_environment_variable_is_rejected(chart: Chart, name: str) -> None:
    with pytest.raises(HelmValuesError, match="/env/0/name") as error:
        chart.render({"env": [{"name": name, "value": API_KEY}]})
    assert API_KEY not in str(error.value)


@pytest.mark.parametrize("auth", [{"hftoken": API_KEY}, API_KEY, {"apiKey": [API_KEY]}], ids=["typo", "text", "list"])
def test_error_about_a_misplaced_key_does_not_print_it(chart: Chart, auth: Any) -> None:
    with pytest.raises(HelmError) as error:
        chart.render({"auth": auth})
    assert API_KEY not in str(error.value)


def test_notes_warn_exactly_when_no_api_key_is_configured(chart: Chart) -> None:
    def notes(auth: Values) -> str:
        values = {"auth": {"generateApiKey": False} | auth}
        (text,) = (text for path, text in chart.render(values).items() if path.endswith("NOTES.txt"))
        return text

    warning = "no API key is configured"
    assert warning in notes({})
    assert warning in notes({"hfToken": HF_TOKEN})
    assert warning in notes({"existingSecret": "team-keys", "existingSecretKeys": {"apiKey": ""}})
    assert warning not in notes({"apiKey": API_KEY})
    assert warning not in notes({"existingSecret": "team-keys"})
    assert warning not in notes({"generateApiKey": True})
