"""The configuration file: what is shipped loads, and what is wrong is named with what is allowed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import config as config_module
from cluster.config import ConfigError, load_config
from scheduler.model.profiles import profile_names
from scheduler.thresholds import Thresholds
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.slo import Slo

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = sorted((REPOSITORY / "configs").glob("*.yaml"))
ARGS = ("applications", 0, "args")
PROFILE = "a100-llama2-7b"
MINIMAL: dict[str, Any] = {
    "applications": [
        {
            "args": {
                "model": {"id": "m", "source": "org/m"}, "accelerator": {"kind": "cpu"},
                "controller": {"profile": PROFILE},
            }
        }
    ]
}
ENGINE_ARGUMENTS = [  # some of vLLM's (slow to import); test_ray_seam.py compares the real list
    "max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "dtype", "enforce_eager",
    "model", "scheduler_cls", "additional_config", "async_scheduling", "data_parallel_size", "data_parallel_size_local",
    "pipeline_parallel_size", "speculative_config", "kv_transfer_config",
]

Key = tuple[str | int, ...]


@pytest.fixture(autouse=True)
def _known_engine_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "_engine_argument_names", lambda: ENGINE_ARGUMENTS)


def with_value(key: Key, value: Any) -> dict[str, Any]:
    """The minimal configuration with one key set."""
    data: Any = copy.deepcopy(MINIMAL)
    node = data
    for part in key[:-1]:
        node = node[part] if isinstance(part, int) else node.setdefault(part, {})
    node[key[-1]] = value
    return data  # type: ignore[no-any-return]


def complaint(tmp_path: Path, key: Key, value: Any) -> str:
    path = tmp_path / "headrace.yaml"
    path.write_text(yaml.safe_dump(with_value(key, value)))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_three_configurations_are_shipped() -> None:
    assert [path.name for path in SHIPPED] == ["a100.yaml", "local.yaml", "ray-cluster.yaml"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_load_and_listen_on_this_machine_only(path: Path) -> None:
    config = load_config(path)
    assert config.base_url == "http://127.0.0.1:8000"
    assert config.application.args.thresholds.policy == "fluid"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_ray_accepts_shipped_configurations(path: Path) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="Ray Serve is not installed")
    data = yaml.safe_load(path.read_text())
    parsed = schema.ServeDeploySchema.model_validate(data)
    assert parsed.applications[0].import_path == "headrace:build"
    assert parsed.applications[0].args == data["applications"][0]["args"]


def test_defaults(tmp_path: Path) -> None:
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    config = load_config(path)
    assert (config.http_options.host, config.http_options.port) == ("127.0.0.1", 8000)
    assert config.ray.address == "local"
    assert config.application.args.controller.enabled
    assert config.application.args.thresholds.policy == "fluid"
    assert config.application.args.targets == Slo()


def test_thresholds_that_name_no_policy_are_those_of_fluid(tmp_path: Path) -> None:
    path = tmp_path / "held.yaml"
    path.write_text(yaml.safe_dump(with_value((*ARGS, "thresholds"), {"max_hold_s": 0.5})))
    assert load_config(path).application.args.thresholds == Thresholds(policy="fluid", max_hold_s=0.5)


def test_targets_reach_the_engine_and_the_controller(tmp_path: Path) -> None:
    path = tmp_path / "targets.yaml"
    path.write_text(yaml.safe_dump(with_value((*ARGS, "targets"), {"ttft_s": 2, "tpot_s": 0.1})))
    args = load_config(path).application.args
    assert args.targets == Slo(2, 0.1)
    assert args.controller.settings(args.targets) == TuningSettings(targets=Slo(2, 0.1)), "by default its defaults"
    for wrong, said in (({"ttft_s": 0}, "ttft_s"), ({"tpot": 1}, "tpot")):
        assert said in complaint(tmp_path, (*ARGS, "targets"), wrong)


def test_tenants_need_names_and_keys_of_their_own(tmp_path: Path) -> None:
    red = {"name": "red", "api_key_env": "KEY_OF_RED"}
    said = complaint(tmp_path, (*ARGS, "tenants"), [red, red | {"name": "blue"}])
    assert "two tenants have api_key_env = 'KEY_OF_RED'" in said
    assert "two tenants have name = 'red'" in complaint(tmp_path, (*ARGS, "tenants"), [red, red])
    assert "weight" in complaint(tmp_path, (*ARGS, "tenants"), [red | {"weight": -1}])


def test_a_wildcard_host_is_reached_over_loopback(tmp_path: Path) -> None:
    path = tmp_path / "open.yaml"
    path.write_text(yaml.safe_dump(with_value(("http_options", "host"), "0.0.0.0") | {}))
    assert load_config(path).base_url == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("key", "dotted", "meant"),
    [
        (("http_option",), "http_option", "http_options"),
        (("ray", "adress"), "ray.adress", "address"),
        (("http_options", "prt"), "http_options.prt", "port"),
        (("applications", 0, "route_prefx"), "applications.0.route_prefx", "route_prefix"),
        ((*ARGS, "replica"), "applications.0.args.replica", "replicas"),
        ((*ARGS, "model", "sorce"), "applications.0.args.model.sorce", "source"),
        ((*ARGS, "accelerator", "knd"), "applications.0.args.accelerator.knd", "kind"),
        ((*ARGS, "controller", "period"), "applications.0.args.controller.period", "period_s"),
        ((*ARGS, "thresholds", "polcy"), "thresholds.polcy", "policy"),
        ((*ARGS, "engine", "max_num_seq"), "applications.0.args.engine", "max_num_seqs"),
    ],
)
def test_a_typo_is_named_with_what_is_meant(tmp_path: Path, key: Key, dotted: str, meant: str) -> None:
    message = complaint(tmp_path, key, 1)
    assert dotted in message
    assert str(key[-1]) in message
    assert f"did you mean {meant}?" in message


@pytest.mark.parametrize(
    ("key", "some_allowed"),
    [
        (("http_option",), "ray, proxy_location, http_options, applications"),
        (("http_options", "prt"), "host, port"),
        ((*ARGS, "model", "sorce"), "id, source"),
        ((*ARGS, "thresholds", "polcy"), "the fields are version, policy, mode, types"),
        ((*ARGS, "thresholds", "types"), "the fields are name, n, max_prompt_tokens, max_output_tokens"),
    ],
)
def test_a_typo_comes_with_every_allowed_key(tmp_path: Path, key: Key, some_allowed: str) -> None:
    value = [{"name": "all", "n": 1, "max_output": 5}] if key[-1] == "types" else 1
    assert some_allowed in complaint(tmp_path, key, value)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ((*ARGS, "replicas"), 0, "greater than or equal to 1"),
        ((*ARGS, "replicas"), -2, "greater than or equal to 1"),
        ((*ARGS, "controller", "period_s"), float("nan"), "finite"),
        ((*ARGS, "controller", "period_s"), 0, "greater than 0"),
        ((*ARGS, "controller", "period_s"), 3601, "3600"),
        ((*ARGS, "controller", "window_s"), float("inf"), "finite"),
        ((*ARGS, "controller", "validity_s"), -1, "greater than 0"),
        ((*ARGS, "controller", "min_finished"), 0, "greater than or equal to 1"),
        ((*ARGS, "controller", "overflow_probability"), 1, "less than 1"),
        ((*ARGS, "accelerator", "cpus"), float("nan"), "greater than or equal to 0"),
        ((*ARGS, "accelerator", "kind"), "tpu", "'cpu' or 'gpu'"),
        ((*ARGS, "thresholds", "max_hold_s"), -1, "seconds from 0 to 60"),
        ((*ARGS, "thresholds", "max_hold_s"), float("nan"), "seconds from 0 to 60"),
        ((*ARGS, "thresholds", "max_running"), 0, "an integer >= 1"),
        ((*ARGS, "thresholds", "policy"), "lifo", "one of fcfs, wait, nested_wait"),
        (("http_options", "port"), 0, "greater than or equal to 1"),
        (("http_options", "port"), 65536, "65535"),
        (("applications", 0, "route_prefix"), "/llm", "'/'"),
        (("ray", "num_cpus"), 0, "greater than or equal to 1"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(
    tmp_path: Path, key: Key, value: Any, allowed: str
) -> None:
    message = complaint(tmp_path, key, value)
    assert str(key[-1]) in message
    assert str(value) in message
    assert allowed in message


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    data = with_value(("http_options", "port"), 0)
    data["applications"][0]["args"]["replicas"] = 0
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert "http_options.port = 0" in str(error.value)
    assert "applications.0.args.replicas = 0" in str(error.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "modelless.yaml"
    path.write_text(yaml.safe_dump({"applications": [{"args": {"accelerator": {"kind": "cpu"}}}]}))
    with pytest.raises(ConfigError, match=r"applications\.0\.args\.model: this key is required"):
        load_config(path)


def test_exactly_one_application(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({"applications": MINIMAL["applications"] * 2}))
    with pytest.raises(ConfigError, match="applications"):
        load_config(path)


def test_an_unknown_profile_lists_the_known_ones(tmp_path: Path) -> None:
    message = complaint(tmp_path, (*ARGS, "controller", "profile"), "a100")
    for name in ("applications.0.args.controller.profile", "'a100'", "a100-llama2-7b", "cpu-smollm2"):
        assert name in message


@pytest.mark.parametrize("controller", [None, {}, {"period_s": 2.0}], ids=str)
def test_a_profile_must_be_named(tmp_path: Path, controller: dict[str, float] | None) -> None:
    data = copy.deepcopy(MINIMAL)
    args = data["applications"][0]["args"]
    args.pop("controller")
    args |= {} if controller is None else {"controller": controller}
    path = tmp_path / "unnamed.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    for part in ("applications.0.args.controller.profile", *profile_names(), "benchmarks/measure_law.py"):
        assert part in str(error.value)


def test_strict_mode_is_rejected(tmp_path: Path) -> None:
    message = complaint(tmp_path, (*ARGS, "thresholds", "mode"), "strict")
    assert "mode = 'strict'" in message
    assert "allowed: serving" in message


@pytest.mark.parametrize("key", ["scheduler_cls", "additional_config", "model", "async_scheduling"])
def test_engine_arguments_that_headrace_sets_are_rejected(tmp_path: Path, key: str) -> None:
    assert f"{key} is set by Headrace itself" in complaint(tmp_path, (*ARGS, "engine", key), "x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty or not a mapping; see configs/local.yaml"),
        (b"- a\n- b\n", "is empty or not a mapping"),
        (b"applications: [", "is not YAML"),
        (b"\xff\xfe\x00\x80", "is not YAML"),
    ],
    ids=["empty", "list", "torn", "binary"],
)
def test_what_is_no_configuration_is_said_so(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert said in str(error.value)


NGRAM = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"engine": {"data_parallel_size": 2, "data_parallel_size_local": 1}}, "give data_parallel_size alone"),
        ({"engine": {"kv_transfer_config": {"kv_role": "kv_both"}}}, "leave kv_transfer_config"),
        (
            {"controller": {"enabled": False, "profile": PROFILE}, "targets": {"ttft_s": 3.0}},
            "leave controller.enabled at true",
        ),
        (
            {"targets": {"tpot_s": 0.008}},
            "targets.tpot_s = 0.008 is below the 0.0112 s that a token takes one request alone",
        ),
    ],
    ids=str,
)
def test_an_engine_setting_that_the_policy_does_not_support_is_rejected(
    tmp_path: Path, args: dict[str, Any], said: str
) -> None:
    data = copy.deepcopy(MINIMAL)
    data["applications"][0]["args"] |= args
    path = tmp_path / "unsupported.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert said in str(error.value)
    assert "'source': 'org/m'" not in str(error.value), "the sentence stands alone"


@pytest.mark.parametrize(
    "args",
    [
        {"engine": {"pipeline_parallel_size": 2}, "targets": {"ttft_s": 3.0, "tpot_s": 0.1}},
        {"engine": NGRAM, "targets": {"tpot_s": 0.1}},
        {"engine": NGRAM, "thresholds": {"policy": "nested_wait"}},
        {"engine": {"kv_transfer_config": {"kv_role": "kv_both"}}, "thresholds": {"policy": "wait"}},
        {"controller": {"enabled": False, "profile": PROFILE}}, {"engine": {"data_parallel_size": 2}},
        {"targets": {"tpot_s": 0.012}}, {"targets": {"tpot_s": 0.008}, "engine": NGRAM},
    ],
    ids=str,
)
def test_an_engine_setting_that_the_policy_goes_with_is_taken(tmp_path: Path, args: dict[str, Any]) -> None:
    data = copy.deepcopy(MINIMAL)
    data["applications"][0]["args"] |= args
    path = tmp_path / "supported.yaml"
    path.write_text(yaml.safe_dump(data))
    assert load_config(path).application.args.model.id == "m"
