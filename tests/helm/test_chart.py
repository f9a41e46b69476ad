"""The Helm chart's RayService, with the real Helm library: pods, configuration, names, packaging."""

from __future__ import annotations

import copy
import shutil
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import helm_python
import pytest
from chart_examples import API_KEY, BEFORE, CHART, CI, EVERYTHING, Values, model
from chart_render import (
    Manifest,
    app_args,
    containers,
    environment,
    objects,
    pod_specs,
    ray_service,
    reference,
    serve_config,
    worker_group,
)
from helm_python import Chart, HelmRenderError, HelmValuesError

REPOSITORY = Path(__file__).resolve().parents[2]


def named(name: str) -> Values:
    return {"model_loading_config": {"model_id": name}}


@pytest.mark.parametrize(
    "values", [None, EVERYTHING, BEFORE, *CI.values()], ids=["defaults", "everything", "before", *CI]
)
def test_lint_has_no_warning_and_no_error(values: Values | None) -> None:
    report = helm_python.lint(CHART, values, strict=True)
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] >= 2] == []


def test_defaults_render_what_a_safe_service_needs(chart: Chart) -> None:
    manifests = objects(chart)
    assert sorted(one["kind"] for one in manifests) == [
        "NetworkPolicy", "Pod", "RayService", "Secret", "ServiceAccount",
    ], "the Pod is helm test's"
    service = ray_service(chart)
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert service["metadata"]["name"] == "demo-headrace"
    for one in manifests:
        assert one["metadata"]["namespace"] == "llm"
        assert one["metadata"]["labels"].items() >= {
            "helm.sh/chart": "headrace-0.1.0",
            "app.kubernetes.io/name": "headrace",
            "app.kubernetes.io/instance": "demo",
            "app.kubernetes.io/version": "0.1.0",
            "app.kubernetes.io/managed-by": "Helm",
        }.items()


def test_large_numbers_stay_whole(chart: Chart) -> None:
    # Go templates print large numbers as 1.048576e+06, which is not an integer to the app.
    entry = app_args(ray_service(chart, EVERYTHING))["llm_configs"][0]
    assert type(entry["engine_kwargs"]["max_model_len"]) is int
    assert serve_config(ray_service(chart, EVERYTHING))["http_options"] == {"host": "0.0.0.0", "port": 8088}


def test_a_tenants_key_comes_from_its_secret_wherever_the_ingress_runs(chart: Chart) -> None:
    for container in containers(ray_service(chart, EVERYTHING)):
        variables = environment(container)
        for index, key in enumerate(("red", "blue")):
            assert variables[f"HEADRACE_TENANT_KEY_{index}"] == reference("keys", key)


@pytest.mark.parametrize("values", [None, EVERYTHING, *CI.values()], ids=["defaults", "everything", *CI])
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
    assert parsed.logging_config.enable_access_log is config["logging_config"]["enable_access_log"] is False


TWO_GPUS = {"tensor_parallel_size": 2}


@pytest.mark.parametrize(
    ("values", "gpus", "workers"),
    [
        (None, 1, 1),
        ({"models": [model(4)]}, 1, 4),
        ({"models": [model(), model(2) | named("n")]}, 1, 3),
        ({"models": [model(2, engine_kwargs=TWO_GPUS)]}, 2, 2),
        ({"models": [model(2, engine_kwargs={"pipeline_parallel_size": 2, **TWO_GPUS})]}, 4, 2),
        ({"models": [model(2, engine_kwargs=TWO_GPUS), model(3) | named("n")]}, 2, 4),
        ({"models": [model(3, engine_kwargs=TWO_GPUS)], "gpu": {"perWorker": 4}}, 4, 2),
        ({"models": [model(2, engine_kwargs=TWO_GPUS)], "gpu": {"perWorker": 1}}, 1, 4),
        # Two of three GPUs do not fit into what two others leave of a pod of four.
        ({"models": [model(3, engine_kwargs={"tensor_parallel_size": 3}), model(engine_kwargs=TWO_GPUS) | named("n")],
          "gpu": {"perWorker": 4}}, 4, 4),
        ({"models": [model(3, engine_kwargs=TWO_GPUS)], "gpu": {"perWorker": 5}}, 5, 2),
        ({"models": [model(deployment_config={"autoscaling_config": {"max_replicas": 5}})]}, 1, 5),
        ({"models": [model(4)], "gpu": {"workers": 7}}, 1, 7),
        ({"models": [model(3)], "gpu": {"perWorker": 0}}, 0, 3),
        (EVERYTHING, 2, 4),
        (CI["gpu"], 4, 3),
        (CI["several-nodes"], 4, 2),
        (CI["cpu-kind"], 0, 1),
    ],
)
def test_the_workers_hold_the_gpus_of_all_replicas(
    chart: Chart, values: Values | None, gpus: int, workers: int
) -> None:
    service = ray_service(chart, values)
    group = worker_group(service)
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [workers] * 3
    _, worker = containers(service)
    for kind in ("requests", "limits"):
        assert worker["resources"][kind].get("nvidia.com/gpu", 0) == gpus


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
        assert spec["securityContext"]["fsGroup"] == 2000
        assert spec["securityContext"]["runAsNonRoot"] is True, "merged with the chart's own"
        assert spec["priorityClassName"] == "high"
        assert spec["topologySpreadConstraints"][0]["topologyKey"] == "kubernetes.io/hostname"
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
        ({"headrace": {"drain_s": 30}, "models": [model(), model(headrace={"drain_s": 900}) | named("n")]}, 900),
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


def test_the_example_for_cpus_serves_the_model_of_the_cpu_image(chart: Chart) -> None:
    service = ray_service(chart, CI["cpu-kind"])
    assert {container["image"] for container in containers(service)} == {f"headrace:{chart.metadata['appVersion']}-cpu"}
    source = app_args(service)["llm_configs"][0]["model_loading_config"]["model_source"]
    dockerfile = REPOSITORY / "Dockerfile"
    if not dockerfile.is_file():
        pytest.skip("there is no Dockerfile yet")
    assert source in dockerfile.read_text("utf-8")


def test_service_port_is_the_serve_port_of_every_pod(chart: Chart) -> None:
    service = ray_service(chart, EVERYTHING)
    for container in containers(service):
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        # KubeRay reads the Service's port on the head and the readiness probe's on the worker by this name.
        assert (ports["serve"], ports["metrics"]) == (8088, 8080)
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
        "/tmp": "tmp",
        "/home/headrace/.cache": "cache",
        "/dev/shm": "shm",
        path: "model-cache",
    }
    volumes = {volume.pop("name"): volume for volume in copy.deepcopy(spec["volumes"])}
    scratch = volumes.pop("tmp")
    assert scratch == volumes.pop("cache") == {"emptyDir": {"sizeLimit": scratch["emptyDir"]["sizeLimit"]}}
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
        packed = {name.partition("/")[2] for name in tar.getnames()}
    files = [path for path in CHART.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    there = {path.relative_to(CHART).as_posix() for path in files}
    assert packed == there - {"ci/" + name + ".yaml" for name in CI}
    with Chart.load(archive) as packaged:
        assert packaged.render(EVERYTHING, name="demo") == chart.render(EVERYTHING, name="demo")
        with pytest.raises(HelmValuesError):
            packaged.validate_schema({"models": []})


def test_chart_version_matches_the_python_package(chart: Chart) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert chart.metadata["appVersion"] == project["version"]
