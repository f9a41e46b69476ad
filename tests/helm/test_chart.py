"""The Helm chart, with the real Helm library: rendered objects, value validation, keys, packaging."""

from __future__ import annotations

import base64
import copy
import json
import shutil
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from chart_examples import API_KEY, CHART, EVERYTHING, HF_TOKEN, Values, model
from helm_python import Chart, HelmError, HelmRenderError, HelmValuesError
from jsonschema import Draft7Validator  # type: ignore[import-untyped]

REPOSITORY = Path(__file__).resolve().parents[2]
CRD = REPOSITORY.parent / "shared" / "data" / "crds" / "ray.io_rayservices.yaml"

Manifest = dict[str, Any]

@pytest.fixture(scope="module")
def chart() -> Iterator[Chart]:
    with Chart.load(CHART) as loaded:
        yield loaded


def objects(chart: Chart, values: Values | None = None, name: str = "demo") -> list[Manifest]:
    """Every Kubernetes object of a release (NOTES.txt is text for the user, not an object)."""
    rendered = chart.render(values, name=name, namespace="llm")
    texts = [text for path, text in sorted(rendered.items()) if path.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def ray_service(chart: Chart, values: Values | None = None, name: str = "demo") -> Manifest:
    (service,) = of_kind(objects(chart, values, name), "RayService")
    return service


def serve_config(service: Manifest) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return config


def app_args(service: Manifest) -> dict[str, Any]:
    args: dict[str, Any] = serve_config(service)["applications"][0]["args"]
    return args


def worker_group(service: Manifest) -> dict[str, Any]:
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return group  # type: ignore[no-any-return]


def pod_specs(service: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod specs of head and worker."""
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
    return head["template"]["spec"], worker_group(service)["template"]["spec"]


def containers(service: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
    head, worker = (spec["containers"] for spec in pod_specs(service))
    assert len(head) == len(worker) == 1
    return head[0], worker[0]


def environment(container: dict[str, Any]) -> dict[str, Any]:
    """Variable name to its plain value or to where it comes from."""
    entries = container.get("env", [])
    names = [entry["name"] for entry in entries]
    assert len(names) == len(set(names))
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in entries}


def nested(path: str, value: Any) -> Values:
    """{"a": {"b": value}} for "a.b"."""
    for key in reversed(path.split(".")):
        value = {key: value}
    result: Values = value
    return result


@pytest.mark.parametrize("values", [None, EVERYTHING], ids=["defaults", "everything"])
def test_lint_has_no_warning_and_no_error(values: Values | None) -> None:
    report = helm_python.lint(CHART, values, strict=True)
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] >= 2] == []


def test_defaults_render_one_ray_service_and_nothing_else(chart: Chart) -> None:
    (service,) = objects(chart)
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert service["metadata"]["name"] == "demo-headrace"
    assert service["metadata"]["namespace"] == "llm"
    assert service["metadata"]["labels"] == {
        "helm.sh/chart": "headrace-0.1.0",
        "app.kubernetes.io/name": "headrace",
        "app.kubernetes.io/instance": "demo",
        "app.kubernetes.io/version": "0.1.0",
        "app.kubernetes.io/managed-by": "Helm",
    }


def test_large_numbers_stay_whole(chart: Chart) -> None:
    # Go templates print large numbers as 1.048576e+06, which is not an integer to the app.
    entry = app_args(ray_service(chart, EVERYTHING))["llm_configs"][0]
    assert type(entry["engine_kwargs"]["max_model_len"]) is int
    assert serve_config(ray_service(chart, EVERYTHING))["http_options"] == {"host": "0.0.0.0", "port": 8080}


def test_a_tenants_key_comes_from_its_secret_wherever_the_ingress_runs(chart: Chart) -> None:
    for container in containers(ray_service(chart, EVERYTHING)):
        variables = environment(container)
        for index, key in enumerate(("red", "blue")):
            assert variables[f"HEADRACE_TENANT_KEY_{index}"] == reference("keys", key)


@pytest.mark.parametrize("values", [None, EVERYTHING], ids=["defaults", "everything"])
def test_serve_config_is_accepted_by_ray(chart: Chart, values: Values | None) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="Ray Serve is not installed")
    config = serve_config(ray_service(chart, values))
    parsed = schema.ServeDeploySchema.model_validate(config)
    (application,) = parsed.applications
    assert application.import_path == "headrace:build"
    assert application.args == config["applications"][0]["args"]
    assert [one.name for one in application.deployments] == [
        one["name"] for one in config["applications"][0]["deployments"]
    ]
    assert (parsed.http_options.host, parsed.http_options.port) == ("0.0.0.0", config["http_options"]["port"])


@pytest.mark.parametrize(
    ("values", "workers"),
    [
        (None, 1),
        ({"models": [model(4)]}, 4),
        ({"models": [model(), model(2)]}, 3),
        ({"models": [model(2, engine_kwargs={"tensor_parallel_size": 2})]}, 4),
        ({"models": [model(3, engine_kwargs={"tensor_parallel_size": 2})], "gpu": {"perWorker": 4}}, 2),
        ({"models": [model(deployment_config={"autoscaling_config": {"max_replicas": 5}})]}, 5),
        ({"models": [model(4)], "gpu": {"workers": 7}}, 7),
        (EVERYTHING, 4),
    ],
    ids=["default", "replicas", "two-models", "tensor-parallel", "large-pods", "autoscaled", "given", "everything"],
)
def test_the_workers_hold_the_gpus_of_all_replicas(chart: Chart, values: Values | None, workers: int) -> None:
    group = worker_group(ray_service(chart, values))
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [workers] * 3


def test_only_workers_have_gpus(chart: Chart) -> None:
    service = ray_service(chart)
    head, worker = containers(service)
    for kind in ("requests", "limits"):
        assert worker["resources"][kind]["nvidia.com/gpu"] == 1
        assert "nvidia.com/gpu" not in head["resources"][kind]


def test_worker_keeps_its_gpu_when_resources_are_overridden(chart: Chart) -> None:
    _, worker = containers(ray_service(chart, EVERYTHING))
    assert worker["resources"] == {
        "requests": {"cpu": "12", "memory": "64Gi", "nvidia.com/gpu": 2},
        "limits": {"cpu": "8", "memory": "96Gi", "nvidia.com/gpu": 2},
    }


def test_head_takes_no_replica(chart: Chart) -> None:
    service = ray_service(chart)
    assert service["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_gpu_product(chart: Chart) -> None:
    assert all("nodeSelector" not in spec for spec in pod_specs(ray_service(chart)))

    service = ray_service(chart, {"gpu": {"product": "NVIDIA-A100-SXM4-80GB"}})
    head, worker = pod_specs(service)
    assert worker["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
    assert "nodeSelector" not in head


def test_pod_options_reach_their_own_group(chart: Chart) -> None:
    service = ray_service(chart, EVERYTHING)
    head, worker = pod_specs(service)
    for spec in (head, worker):
        assert spec["serviceAccountName"] == "serving"
        assert spec["imagePullSecrets"] == [{"name": "registry-key"}]
        assert spec["securityContext"] == {"fsGroup": 1000, "runAsNonRoot": True}
        assert spec["containers"][0]["image"] == "registry.example/headrace:1.2.3"
        assert spec["containers"][0]["imagePullPolicy"] == "Always"
    assert head["nodeSelector"] == {"pool": "cpu"}
    assert worker["nodeSelector"] == {"pool": "gpu", "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    for group, spec in (("head", head), ("worker", worker)):
        assert spec["tolerations"] == EVERYTHING[group]["tolerations"]
        assert spec["affinity"] == EVERYTHING[group]["affinity"]
    for container in containers(service):
        variables = environment(container)
        assert variables["VLLM_LOGGING_LEVEL"] == "DEBUG"
        assert variables["POD_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == "2.60.1"
    assert service["spec"]["upgradeStrategy"] == {"type": "None"}


@pytest.mark.parametrize(
    ("values", "drain_s"),
    [
        (None, 600),
        ({"headrace": {"drain_s": 29.5}}, 30),
        ({"headrace": {"drain_s": 0}}, 0),
        ({"headrace": {"drain_s": 30}, "models": [model(), model(headrace={"drain_s": 900})]}, 900),
        ({"models": [model(headrace={"drain_s": 30})]}, 30),
    ],
    ids=["default", "fraction", "zero", "longest-of-two", "shorter-for-the-one"],
)
def test_a_worker_pod_outlasts_the_drain_of_its_replicas(chart: Chart, values: Values | None, drain_s: int) -> None:
    service = ray_service(chart, values)
    head, worker = pod_specs(service)
    assert worker["terminationGracePeriodSeconds"] == drain_s + 60
    assert "terminationGracePeriodSeconds" not in head and "lifecycle" not in head["containers"][0]
    shell, option, command = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, option) == ("/bin/bash", "-c")
    assert " ".join(documented_pre_stop().split()).replace("600", str(drain_s)) == command


def documented_pre_stop() -> str:
    text = (REPOSITORY / "docs" / "operate" / "ray-cluster.md").read_text(encoding="utf-8")
    return next(block for block in text.split("```sh") if "ray drain-node" in block).split("```")[0]


def test_image_tag_defaults_to_the_app_version(chart: Chart) -> None:
    images = {container["image"] for container in containers(ray_service(chart))}
    assert images == {f"headrace:{chart.metadata['appVersion']}"}


def test_service_port_is_the_serve_port_of_every_pod(chart: Chart) -> None:
    service = ray_service(chart, EVERYTHING)
    for container in containers(service):
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        # KubeRay reads the Service's port on the head and the readiness probe's on the worker by this name.
        assert ports["serve"] == 8080
    assert service["spec"]["serveService"]["spec"] == {"type": "LoadBalancer"}
    assert service["spec"]["serveService"]["metadata"]["annotations"] == {"example.com/internal": "true"}
    assert ray_service(chart)["spec"]["serveService"]["spec"] == {"type": "ClusterIP"}


@pytest.mark.parametrize(
    ("values", "shm", "cache", "path"),
    [
        (None, "16Gi", {"emptyDir": {"sizeLimit": "100Gi"}}, "/model-cache"),
        (EVERYTHING, 17179869184, {"persistentVolumeClaim": {"claimName": "models"}}, "/models"),
    ],
    ids=["defaults", "claim"],
)
def test_worker_volumes(chart: Chart, values: Values | None, shm: Any, cache: Manifest, path: str) -> None:
    service = ray_service(chart, values)
    _, spec = pod_specs(service)
    _, container = containers(service)
    assert {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]} == {
        "/dev/shm": "shm",
        path: "model-cache",
    }
    volumes = {volume.pop("name"): volume for volume in copy.deepcopy(spec["volumes"])}
    assert volumes == {"shm": {"emptyDir": {"medium": "Memory", "sizeLimit": shm}}, "model-cache": cache}
    assert environment(container)["HF_HOME"] == path


@pytest.mark.parametrize(
    ("values", "release", "expected"),
    [
        (None, "my-headrace", "my-headrace"),
        ({"nameOverride": "llm"}, "demo", "demo-llm"),
        ({"fullnameOverride": "chat"}, "demo", "chat"),
        # YAML would read these as an integer and as a boolean.
        ({"fullnameOverride": "true"}, "123", "true"),
        # The cut falls right behind a dash.
        (None, "a" * 46 + "-b", "a" * 46),
        (None, "a" * 53, "a" * 47),
    ],
)
def test_object_name(chart: Chart, values: Values | None, release: str, expected: str) -> None:
    service = ray_service(chart, values, release)
    assert service["metadata"]["name"] == expected
    assert service["metadata"]["labels"]["app.kubernetes.io/instance"] == release


def test_name_that_kuberay_rejects_is_rejected_here(chart: Chart) -> None:
    with pytest.raises(HelmRenderError, match="fullnameOverride"):
        chart.render(name="7b")


def test_pod_templates_do_not_change_with_the_chart_version(chart: Chart) -> None:
    # KubeRay starts a whole new cluster when they do.
    head = ray_service(chart)["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["metadata"]
    worker = worker_group(ray_service(chart))["template"]["metadata"]
    for metadata, component in ((head, "head"), (worker, "worker")):
        assert metadata == {"labels": {"app.kubernetes.io/instance": "demo", "app.kubernetes.io/component": component}}


# --- values.schema.json -----------------------------------------------------------------------------------------


def typos() -> list[tuple[Values, str]]:
    """One misspelt key in every mapping of values.yaml with fixed keys."""
    free_form = {"annotations", "nodeSelector", "keys"}

    def mappings(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if isinstance(value, dict) and not (path and path[-1] in free_form):
            yield path
            for key, child in value.items():
                yield from mappings(child, (*path, key))

    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    return [(nested(".".join((*path, "replicaz")), "x"), ".".join(path)) for path in mappings(defaults, ())]


@pytest.mark.parametrize(("values", "path"), [pytest.param(*typo, id=typo[1] or "root") for typo in typos()])
def test_misspelt_key_is_rejected_by_name(chart: Chart, values: Values, path: str) -> None:
    with pytest.raises(HelmValuesError) as error:
        chart.render(values)
    assert f"at '{'/' + path.replace('.', '/') if path else ''}'" in str(error.value)
    assert "'replicaz' not allowed" in str(error.value)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (nested("headrace.limits.keys", {"team-a": {"requests": 1}}), "'requests'"),
        ({"models": [model(headrace={"target": {}})]}, "'target'"),
        ({"models": [model(headrace={"targets": {"ttft": 1}})]}, "'ttft'"),
        ({"models": [model(headrace={"controller": {"period": 1}})]}, "'period'"),
        (nested("env", [{"name": "A", "valu": "x"}]), "'valu'"),
        (nested("worker.tolerations", [{"keys": "x"}]), "'keys'"),
        (nested("imagePullSecrets", [{"nam": "x"}]), "'nam'"),
        (nested("head.affinity", {"nodeAffinit": {}}), "'nodeAffinit'"),
        (nested("podSecurityContext", {"fsgroup": 1}), "'fsgroup'"),
        (nested("podSecurityContext.seccompProfile", {"type": "RuntimeDefault", "profile": "x"}), "'profile'"),
        (nested("env", [{"name": "A", "valueFrom": {"secretRef": {}}}]), "'secretRef'"),
        (nested("env", [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "k": 1}}}]), "'k'"),
        (nested("env", [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "s", "key": "k", "k": 1}}}]), "'k'"),
        (nested("env", [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "p", "path": 1}}}]), "'path'"),
        (nested("env", [{"name": "A", "valueFrom": {"resourceFieldRef": {"resource": "r", "unit": 1}}}]), "'unit'"),
    ],
)
def test_misspelt_key_in_an_optional_structure_is_rejected(chart: Chart, values: Values, named: str) -> None:
    with pytest.raises(HelmValuesError, match=f"{named} not allowed"):
        chart.render(values)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("models", []),
        ("models", {}),
        ("models", None),
        ("gpu.perWorker", 0),
        ("gpu.workers", 0),
        ("targets.ttftSeconds", 0),
        ("targets.tpotSeconds", "fast"),
        ("tenants", "red"),
        ("policy.name", "lifo"),
        ("policy.maxHoldSeconds", -0.1),
        ("policy.maxHoldSeconds", 61),
        ("controller.periodSeconds", 0),
        ("controller.periodSeconds", 3601),
        ("controller.enabled", "yes"),
        ("headrace.drain_s", -1),
        ("headrace.drain_s", 86401),
        ("headrace.engine_timeout_s", 0),
        ("headrace.max_wait_s", 0),
        ("headrace.limits.choices", 0),
        ("headrace.limits.json_depth", 191),
        ("headrace.limits.body_s", "long"),
        ("headrace.limits.cors_origins", "*"),
        ("headrace.limits.keys.team-a.requests_per_minute", 0.5),
        ("image.repository", ""),
        ("image.pullPolicy", "Sometimes"),
        ("ray.version", 2.6),
        ("service.type", "ExternalName"),
        ("service.port", 0),
        ("service.port", 70000),
        ("service.port", 8265),  # Ray's dashboard
        ("upgradeStrategy", "Always"),
        ("shm.sizeLimit", "16 GB"),
        ("modelCache.mountPath", "cache"),
        ("gpu.product", "NVIDIA A100"),  # a label value has no spaces
        ("fullnameOverride", "Headrace"),
        ("fullnameOverride", "a" * 48),
        ("auth.existingSecret", "My Secret"),
        ("worker.resources.limits.cpu", 0.5),  # the API takes integers and strings
    ],
)
def test_bad_value_is_rejected_by_path(chart: Chart, path: str, value: Any) -> None:
    with pytest.raises(HelmValuesError) as error:
        chart.render(nested(path, value))
    # A null removes the default, so that the key is missing from its parent.
    expected = f"missing property '{path}'" if value is None else f"at '/{path.replace('.', '/')}'"
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        # gpu.perWorker says how many.
        (nested("worker.resources", {"limits": {"nvidia.com/gpu": 2}}), "nvidia.com/gpu"),
        ({"models": [model(engine_kwargs={"scheduler_cls": "x"})]}, "scheduler_cls"),
        ({"models": [model(engine_kwargs={"max-num-seqs": 1})]}, "max-num-seqs"),
        ({"models": [model(deployment_config={"user_config": {}})]}, "user_config"),
        ({"models": [model(server_cls="x")]}, "'server_cls' not allowed"),
        ({"models": [model(acelerator_type="A100")]}, "'acelerator_type' not allowed"),
        ({"models": [{"model_loading_config": {}}]}, "missing property 'model_id'"),
        ({"models": [model(0)]}, "/models/0/deployment_config/num_replicas"),
        ({"models": [model("auto")]}, "/models/0/deployment_config/num_replicas"),
    ],
)
def test_value_that_contradicts_another_is_rejected(chart: Chart, values: Values, named: str) -> None:
    with pytest.raises(HelmValuesError, match=named):
        chart.render(values)


def test_chart_works_below_a_parent_chart(chart: Chart) -> None:
    # Helm hands every subchart a `global` mapping.
    assert objects(chart, {"global": {"anything": 1}}) == objects(chart)


# --- keys -------------------------------------------------------------------------------------------------------


def reference(secret: str, key: str) -> dict[str, Any]:
    return {"secretKeyRef": {"name": secret, "key": key}}


def test_without_keys_no_pod_reads_a_secret(chart: Chart) -> None:
    assert of_kind(objects(chart), "Secret") == []
    for container in containers(ray_service(chart)):
        assert environment(container).keys() <= {"HF_HOME"}


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
    manifests = objects(chart, {"auth": auth})
    (secret,) = of_kind(manifests, "Secret")
    assert secret["metadata"]["name"] == "demo-headrace-auth"
    assert {key: base64.b64decode(value).decode() for key, value in secret["data"].items()} == dict(variables.values())
    (service,) = of_kind(manifests, "RayService")
    for container in containers(service):
        found = environment(container)
        found.pop("HF_HOME", None)
        assert found == {name: reference("demo-headrace-auth", key) for name, (key, _) in variables.items()}


def test_existing_secret_is_referred_to_and_not_created(chart: Chart) -> None:
    manifests = objects(chart, {"auth": {"existingSecret": "team-keys"}})
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
        (text,) = (text for path, text in chart.render({"auth": auth}).items() if path.endswith("NOTES.txt"))
        return text

    warning = "no API key is configured"
    assert warning in notes({})
    assert warning in notes({"hfToken": HF_TOKEN})
    assert warning in notes({"existingSecret": "team-keys", "existingSecretKeys": {"apiKey": ""}})
    assert warning not in notes({"apiKey": API_KEY})
    assert warning not in notes({"existingSecret": "team-keys"})


# --- KubeRay's custom resource definition -----------------------------------------------------------------------


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD's structural schema as JSON schema, with the fields the API server would drop made errors."""
    result = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    result.pop("nullable", None)
    result.pop("default", None)
    if "properties" in schema:
        result["properties"] = {name: strict(child) for name, child in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = strict(schema["additionalProperties"])
    if isinstance(schema.get("items"), dict):
        result["items"] = strict(schema["items"])
    if schema.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    if schema.get("nullable"):
        result = {"anyOf": [{"type": "null"}, result]}
    return result


@pytest.fixture(scope="module")
def kuberay() -> Draft7Validator:
    if not CRD.is_file():
        pytest.skip(f"KubeRay's CRD is not at {CRD.relative_to(REPOSITORY.parent)} beside the repository")
    # The pure-Python loader takes several seconds for this file.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    definition = yaml.load(CRD.read_text(encoding="utf-8"), Loader=loader)
    (version,) = (version for version in definition["spec"]["versions"] if version["name"] == "v1")
    return Draft7Validator(strict(version["schema"]["openAPIV3Schema"]))


def complaints(validator: Draft7Validator, manifest: Manifest) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


@pytest.mark.parametrize(
    "values",
    [None, EVERYTHING, {"auth": {"existingSecret": "team-keys"}}],
    ids=["defaults", "everything", "existing-secret"],
)
def test_ray_service_fits_kuberays_definition(chart: Chart, kuberay: Draft7Validator, values: Values | None) -> None:
    assert complaints(kuberay, ray_service(chart, values)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.serveConfig", ""),
        ("spec.rayClusterConfig.rayversion", "2.60.0"),
        ("spec.rayClusterConfig.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterConfig.headGroupSpec.template.spec.nodeselector", {}),
        ("spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.ports.0.containerport", 1),
        ("spec.rayClusterConfig.workerGroupSpecs.0.replicas", "1"),
        ("spec.rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.resources.limits.cpu", 0.5),
        ("spec.rayClusterConfig.workerGroupSpecs.0.template.spec.volumes.0.emptyDir.sizeLimit", "16 GB"),
    ],
)
def test_definition_check_sees_wrong_fields_and_types(
    chart: Chart, kuberay: Draft7Validator, path: str, value: Any
) -> None:
    manifest = ray_service(chart)
    *parents, last = path.split(".")
    target: Any = manifest
    for key in parents:
        target = target[int(key)] if isinstance(target, list) else target[key]
    target[last] = value
    found = complaints(kuberay, manifest)
    assert found
    assert all(last in complaint for complaint in found)


# --- packaging --------------------------------------------------------------------------------------------------


def test_two_renders_are_identical() -> None:
    def render() -> dict[str, str]:
        with Chart.load(CHART) as loaded:
            return loaded.render(EVERYTHING, name="demo", namespace="llm")

    assert render() == render()


def test_package_renders_like_the_folder_and_holds_no_site_values(chart: Chart, tmp_path: Path) -> None:
    source = tmp_path / "headrace"
    shutil.copytree(CHART, source)
    (source / "values-production.yaml").write_text(f"auth: {{apiKey: {API_KEY}}}\n", encoding="utf-8")

    archive = Path(helm_python.package(source, destination=tmp_path))

    assert archive.name == "headrace-0.1.0.tgz"
    with tarfile.open(archive) as tar:
        assert sorted(tar.getnames()) == [
            "headrace/.helmignore",
            "headrace/Chart.yaml",
            "headrace/files/grafana-dashboard.json",
            "headrace/files/rules.yaml",
            "headrace/templates/NOTES.txt",
            "headrace/templates/_helpers.tpl",
            "headrace/templates/rayservice.yaml",
            "headrace/templates/secret.yaml",
            "headrace/values.schema.json",
            "headrace/values.yaml",
        ]
    with Chart.load(archive) as packaged:
        assert packaged.render(EVERYTHING, name="demo") == chart.render(EVERYTHING, name="demo")
        with pytest.raises(HelmValuesError):
            packaged.validate_schema({"models": []})


def test_chart_version_matches_the_python_package(chart: Chart) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert chart.metadata["appVersion"] == project["version"]
