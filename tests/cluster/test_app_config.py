"""The configuration file: what is shipped loads, and what is wrong is named with what is allowed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import AppConfig, ConfigError, load_config
from cluster.llm_entry import WITHOUT_ENGINE
from cluster.serve_file import serve_file
from cluster.tuned import TunedModel
from replicas.ranks import ServedModel
from scheduler.model.profiles import profile_names
from scheduler.thresholds import Thresholds
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.slo import Slo

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = sorted((REPOSITORY / "configs").glob("*.yaml"))
ARGS = ("applications", 0, "args")
ENTRY = (*ARGS, "llm_configs", 0)
OURS = (*ARGS, "headrace")
PROFILE = "a100-llama2-7b"
MINIMAL: dict[str, Any] = {
    "applications": [
        {
            "args": {
                "llm_configs": [
                    {
                        "model_loading_config": {"model_id": "m", "model_source": "org/m"},
                        "accelerator_config": {"kind": "cpu"},
                    }
                ],
                "headrace": {"controller": {"profile": PROFILE}},
            }
        }
    ]
}

Key = tuple[str | int, ...]



def with_value(key: Key, value: Any) -> dict[str, Any]:
    """The minimal configuration with one key set."""
    data: Any = copy.deepcopy(MINIMAL)
    node = data
    for part in key[:-1]:
        node = node[part] if isinstance(part, int) else node.setdefault(part, {})
    node[key[-1]] = value
    return data  # type: ignore[no-any-return]


def of_args(llm: dict[str, Any] | None = None, **args: Any) -> AppConfig:
    """The minimal arguments with keys of the one entry, and of the arguments themselves, added."""
    minimal = copy.deepcopy(MINIMAL["applications"][0]["args"])
    minimal["llm_configs"][0] |= llm or {}
    minimal["headrace"] |= args.pop("headrace", {})
    return AppConfig.model_validate(minimal | args, context=WITHOUT_ENGINE)


def complaint(tmp_path: Path, key: Key, value: Any) -> str:
    path = tmp_path / "headrace.yaml"
    path.write_text(yaml.safe_dump(with_value(key, value)))
    with pytest.raises(ConfigError) as error:
        load_config(path, with_engine=False)
    assert str(path) in str(error.value)
    return str(error.value)


def test_three_configurations_are_shipped() -> None:
    assert [path.name for path in SHIPPED] == ["a100.yaml", "local.yaml", "ray-cluster.yaml"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.ray
@pytest.mark.engine
def test_shipped_configurations_load_and_listen_on_this_machine_only(path: Path) -> None:
    config = load_config(path)
    assert config.base_url == "http://127.0.0.1:8000"
    for entry in config.application.args.llm_configs:
        assert config.application.args.settings_of(entry.model_id).thresholds.policy == "fluid"


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
    config = load_config(path, with_engine=False)
    assert (config.http_options.host, config.http_options.port) == ("127.0.0.1", 8000)
    assert config.ray.address == "local"
    settings = config.application.args.settings_of("m")
    assert settings.controller.enabled
    assert settings.thresholds.policy == "fluid"
    assert settings.targets == Slo()
    assert (settings.drain_s, settings.engine_timeout_s, settings.max_wait_s) == (600, 10, 600)


def test_thresholds_that_name_no_policy_are_those_of_fluid(tmp_path: Path) -> None:
    path = tmp_path / "held.yaml"
    path.write_text(yaml.safe_dump(with_value((*OURS, "thresholds"), {"max_hold_s": 0.5})))
    settings = load_config(path, with_engine=False).application.args.settings_of("m")
    assert settings.thresholds == Thresholds(policy="fluid", max_hold_s=0.5)


def test_targets_reach_the_engine_and_the_controller(tmp_path: Path) -> None:
    path = tmp_path / "targets.yaml"
    path.write_text(yaml.safe_dump(with_value((*OURS, "targets"), {"ttft_s": 2, "tpot_s": 0.1})))
    settings = load_config(path, with_engine=False).application.args.settings_of("m")
    assert settings.targets == Slo(2, 0.1)
    assert settings.tuning() == TuningSettings(targets=Slo(2, 0.1)), "by default its defaults"
    for wrong, said in (({"ttft_s": 0}, "ttft_s"), ({"tpot": 1}, "tpot")):
        assert said in complaint(tmp_path, (*OURS, "targets"), wrong)


def test_tenants_need_names_and_keys_of_their_own(tmp_path: Path) -> None:
    red = {"name": "red", "api_key_env": "KEY_OF_RED"}
    said = complaint(tmp_path, (*OURS, "tenants"), [red, red | {"name": "blue"}])
    assert "two tenants have api_key_env = 'KEY_OF_RED'" in said
    assert "two tenants have name = 'red'" in complaint(tmp_path, (*OURS, "tenants"), [red, red])
    assert "weight" in complaint(tmp_path, (*OURS, "tenants"), [red | {"weight": -1}])


def test_limits_of_a_key_are_a_tenant_s_or_the_operator_s_or_those_without_a_key(tmp_path: Path) -> None:
    tenant = {"name": "free-tier", "api_key_env": "KEY"}
    keys = {"free-tire": {}, "free-tier": {}, "operator": {}, "anonymous": {}}
    said = complaint(tmp_path, OURS, {"tenants": [tenant], "limits": {"keys": keys}})
    assert "headrace.limits.keys.free-tire: no tenant has this name" in said
    assert "allowed here: free-tier, operator, anonymous; did you mean free-tier?" in said
    assert "keys.operator" not in said
    del keys["free-tire"]
    limits = of_args(headrace={"tenants": [tenant], "limits": {"keys": keys}}).headrace.limits
    assert limits.keys.keys() == keys.keys()


def test_a_limit_that_is_for_all_is_no_model_s_own(tmp_path: Path) -> None:
    own = {"choices": 1, "max_tokens": 2, "prompt_tokens": 3, "front_door": False}
    assert of_args({"headrace": {"limits": own}}).settings_of("m").limits.choices == 1
    for wrong in ({"requests_per_minute": 1}, {"keys": {"operator": {}}}, {"json_depth": 64}):
        (name,) = wrong
        said = complaint(tmp_path, (*ENTRY, "headrace", "limits"), own | wrong)
        assert f"llm_configs.0.headrace.limits.{name}: this limit is for all models; it goes into the headrace" in said
        assert "limits.choices" not in said


def test_a_wildcard_host_is_reached_over_loopback(tmp_path: Path) -> None:
    path = tmp_path / "open.yaml"
    path.write_text(yaml.safe_dump(with_value(("http_options", "host"), "0.0.0.0") | {}))
    assert load_config(path, with_engine=False).base_url == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("key", "dotted", "meant"),
    [
        (("http_option",), "http_option", "http_options"),
        (("ray", "adress"), "ray.adress", "address"),
        (("http_options", "prt"), "http_options.prt", "port"),
        (("applications", 0, "route_prefx"), "applications.0.route_prefx", "route_prefix"),
        ((*ARGS, "llm_config"), "applications.0.args.llm_config", "llm_configs"),
        ((*ENTRY, "headrace", "target"), "llm_configs.0.headrace.target", "targets"),
        ((*OURS, "drains"), "headrace.drains", "drain_s"),
        ((*OURS, "controller", "period"), "headrace.controller.period", "period_s"),
        ((*OURS, "thresholds", "polcy"), "thresholds.polcy", "policy"),
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
        (("http_option",), "ray, proxy_location, http_options, logging_config, applications"),
        (("http_options", "prt"), "host, port"),
        ((*ENTRY, "headrace", "tenants"), "targets, thresholds, scheduler, controller, autoscaling, limits, drain_s"),
        ((*OURS, "thresholds", "polcy"), "the fields are version, policy, mode, types"),
        ((*OURS, "thresholds", "types"), "the fields are name, n, max_prompt_tokens, max_output_tokens"),
    ],
)
def test_a_typo_comes_with_every_allowed_key(tmp_path: Path, key: Key, some_allowed: str) -> None:
    value = [{"name": "all", "n": 1, "max_output": 5}] if key[-1] == "types" else 1
    assert some_allowed in complaint(tmp_path, key, value)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ((*OURS, "drain_s"), 86401, "less than or equal to 86400"),
        ((*OURS, "engine_timeout_s"), 0, "greater than 0"),
        ((*OURS, "max_wait_s"), 0, "greater than 0"),
        ((*OURS, "controller", "period_s"), float("nan"), "finite"),
        ((*OURS, "controller", "period_s"), 0, "greater than 0"),
        ((*OURS, "controller", "period_s"), 3601, "3600"),
        ((*OURS, "controller", "window_s"), float("inf"), "finite"),
        ((*OURS, "controller", "validity_s"), -1, "greater than 0"),
        ((*OURS, "controller", "min_finished"), 0, "greater than or equal to 1"),
        ((*OURS, "controller", "overflow_probability"), 0.6, "less than or equal to 0.5"),
        ((*OURS, "thresholds", "max_hold_s"), -1, "seconds from 0 to 60"),
        ((*OURS, "thresholds", "max_hold_s"), float("nan"), "seconds from 0 to 60"),
        ((*OURS, "thresholds", "max_running"), 0, "an integer >= 1"),
        ((*OURS, "thresholds", "policy"), "lifo", "one of fcfs, wait, nested_wait"),
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
    data["applications"][0]["args"]["headrace"]["drain_s"] = -1
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError) as error:
        load_config(path, with_engine=False)
    assert "http_options.port = 0" in str(error.value)
    assert "applications.0.args.headrace.drain_s = -1" in str(error.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "modelless.yaml"
    path.write_text(yaml.safe_dump({"applications": [{"args": {"llm_configs": [{}]}}]}))
    with pytest.raises(ConfigError, match=r"args\.llm_configs\.0\.model_loading_config: this key is required"):
        load_config(path, with_engine=False)


@pytest.mark.parametrize(
    ("key", "goes_into"),
    [
        ("model", "llm_configs[].model_loading_config"), ("replicas", "llm_configs[].deployment_config: {num_replicas"),
        ("engine", "llm_configs[].engine_kwargs"), ("accelerator", "llm_configs[].accelerator_config"),
        ("env", "llm_configs[].runtime_env: {env_vars"), ("targets", "headrace: {targets"),
        ("controller", "headrace: {controller"),
    ],
)
def test_a_key_of_the_old_short_form_is_told_where_it_went(tmp_path: Path, key: str, goes_into: str) -> None:
    said = complaint(tmp_path, (*ARGS, key), {})
    assert f"applications.0.args.{key}: no such key; its value goes into {goes_into}" in said


def test_two_entries_of_one_name_are_rejected(tmp_path: Path) -> None:
    entries = MINIMAL["applications"][0]["args"]["llm_configs"] * 2
    said = complaint(tmp_path, (*ARGS, "llm_configs"), entries)
    assert "llm_configs.1.model_loading_config.model_id = 'm': another entry has this name" in said


def test_an_entry_may_be_a_file_as_for_ray(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump(MINIMAL["applications"][0]["args"]["llm_configs"][0]))
    args = of_args(llm_configs=[str(file)])
    assert args.llm_configs == of_args().llm_configs
    assert "no entry can be read there" in complaint(tmp_path, (*ARGS, "llm_configs"), [str(tmp_path / "nowhere")])


# Settings of all models and of one.


def test_a_model_s_own_settings_override_the_general_ones_field_by_field() -> None:
    general = {
        "targets": {"ttft_s": 5.0, "tpot_s": 0.5}, "drain_s": 30.0, "thresholds": {"max_hold_s": 0.5},
        "controller": {"profile": PROFILE, "period_s": 2.0},
    }
    own = {
        "targets": {"ttft_s": 9.0}, "thresholds": {"max_running": 8}, "max_wait_s": None,
        "controller": {"profile": "cpu-smollm2"},
    }
    entry = MINIMAL["applications"][0]["args"]["llm_configs"][0]
    other = {"model_loading_config": {"model_id": "other"}, "headrace": own}
    args = of_args(llm_configs=[entry, other], headrace=general)
    first, second = args.settings_of("m"), args.settings_of("other")
    assert (first.targets, first.drain_s, first.max_wait_s) == (Slo(5.0, 0.5), 30.0, 600.0)
    assert (second.targets, second.drain_s, second.max_wait_s) == (Slo(9.0, 0.5), 30.0, None)
    assert first.thresholds == Thresholds(policy="fluid", max_hold_s=0.5)
    assert second.thresholds == Thresholds(policy="fluid", max_hold_s=0.5, max_running=8)
    assert (first.controller.profile, second.controller.profile) == (PROFILE, "cpu-smollm2")
    assert second.controller.period_s == 2.0


def test_own_thresholds_with_a_policy_are_taken_whole() -> None:
    general = {"thresholds": {"policy": "wait", "types": [{"name": "all", "n": 4}]}}
    args = of_args({"headrace": {"thresholds": {"policy": "fcfs"}}}, headrace=general)
    assert args.settings_of("m").thresholds == Thresholds(policy="fcfs")


def test_settings_that_only_together_are_wrong_are_named_with_their_model(tmp_path: Path) -> None:
    data = with_value((*ENTRY, "headrace"), {"targets": {"tpot_s": 0.008}})
    data["applications"][0]["args"]["headrace"]["targets"] = {"tpot_s": 0.1}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=r"llm_configs\.0: model m: targets\.tpot_s = 0\.008 is below"):
        load_config(path, with_engine=False)


def test_without_ray_and_vllm_the_rest_is_still_checked(tmp_path: Path) -> None:
    path = tmp_path / "unknown.yaml"
    path.write_text(yaml.safe_dump(with_value((*ENTRY, "engine_kwargs"), {"max_num_seq": 1})))
    assert load_config(path, with_engine=False).application.args.llm_configs[0].model_id == "m"
    path.write_text(yaml.safe_dump(with_value((*ENTRY, "engine_kwargs"), {"scheduler_cls": "mine"})))
    with pytest.raises(ConfigError, match="headrace.scheduler"):
        load_config(path, with_engine=False)


def test_exactly_one_application(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({"applications": MINIMAL["applications"] * 2}))
    with pytest.raises(ConfigError, match="applications"):
        load_config(path, with_engine=False)


def test_an_unknown_profile_lists_the_known_ones(tmp_path: Path) -> None:
    message = complaint(tmp_path, (*OURS, "controller", "profile"), "a100")
    for name in ("applications.0.args.headrace.controller.profile", "'a100'", "a100-llama2-7b", "cpu-smollm2"):
        assert name in message


@pytest.mark.parametrize("controller", [None, {}, {"period_s": 2.0}], ids=str)
def test_a_profile_must_be_named(tmp_path: Path, controller: dict[str, float] | None) -> None:
    data = copy.deepcopy(MINIMAL)
    args = data["applications"][0]["args"]
    args["headrace"] = {} if controller is None else {"controller": controller}
    args["llm_configs"].append({"model_loading_config": {"model_id": "another"}})
    path = tmp_path / "unnamed.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError) as error:
        load_config(path, with_engine=False)
    for part in ("applications.0.args.headrace.controller.profile: name", *profile_names(), "headrace profile measure"):
        assert str(error.value).count(part) == 1 or part in profile_names(), "said once for all models"
        assert part in str(error.value)


@pytest.mark.parametrize(("accelerator_type", "known"), [
    ("H100", True), ("A100", True), ("A100-80G", True), ("AMD-Instinct-MI300X-OAM", True), ("A10G", False),
])
def test_a_known_accelerator_needs_no_profile(tmp_path: Path, accelerator_type: str, known: bool) -> None:
    data = copy.deepcopy(MINIMAL)
    args = data["applications"][0]["args"]
    args["headrace"] = {"targets": {"tpot_s": 0.0001}}  # not checked against an estimate: a guess closes no gate
    for entry in args["llm_configs"]:
        del entry["accelerator_config"]
        entry["accelerator_type"] = accelerator_type
    path = tmp_path / "estimated.yaml"
    path.write_text(yaml.safe_dump(data))
    if not known:
        with pytest.raises(ConfigError, match="controller.profile: name the profile"):
            load_config(path, with_engine=False)
        return
    config = load_config(path, with_engine=False)
    settings = config.application.args.settings_of(config.application.args.llm_configs[0].model_id)
    assert TunedModel(ServedModel("m", 1), settings).time_model is None
    rendered = serve_file(config)["applications"][0]["args"]
    assert "controller" not in rendered["llm_configs"][0]["headrace"]
    AppConfig.model_validate(rendered, context=WITHOUT_ENGINE)  # what KubeRay reads is a whole configuration too


def test_strict_mode_is_rejected(tmp_path: Path) -> None:
    message = complaint(tmp_path, (*OURS, "thresholds", "mode"), "strict")
    assert "mode = 'strict'" in message
    assert "allowed: serving" in message


@pytest.mark.parametrize(
    "key",
    [
        ("engine_kwargs", "scheduler_cls"), ("engine_kwargs", "additional_config"), ("engine_kwargs", "model"),
        ("engine_kwargs", "async_scheduling"), ("deployment_config", "user_config"),
        ("deployment_config", "graceful_shutdown_timeout_s"), ("server_cls",), ("llm_engine",),
    ],
    ids=".".join,
)
def test_what_headrace_sets_is_rejected(tmp_path: Path, key: Key) -> None:
    assert f"{'.'.join(map(str, key))}: set by Headrace itself" in complaint(tmp_path, (*ENTRY, *key), "x")


def test_the_class_of_the_ingress_is_ours_and_its_deployment_the_operator_s(tmp_path: Path) -> None:
    assert "set by Headrace itself" in complaint(tmp_path, (*ARGS, "ingress_cls_config"), {})
    assert of_args(ingress_deployment_config={"num_replicas": 3}).ingress_deployment_config == {"num_replicas": 3}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml", with_engine=False)


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
        load_config(path, with_engine=False)
    assert str(path) in str(error.value)
    assert said in str(error.value)


NGRAM = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}


@pytest.mark.parametrize(
    ("engine", "headrace", "said"),
    [
        ({"data_parallel_size": 2, "data_parallel_size_local": 1}, {}, "give data_parallel_size alone"),
        ({"kv_transfer_config": {"kv_role": "kv_both"}}, {}, "leave kv_transfer_config"),
        (
            {}, {"controller": {"enabled": False, "profile": PROFILE}, "targets": {"ttft_s": 3.0}},
            "leave controller.enabled at true",
        ),
        (
            {}, {"targets": {"tpot_s": 0.008}},
            "targets.tpot_s = 0.008 is below the 0.0112 s that a token takes one request alone",
        ),
    ],
    ids=str,
)
def test_an_engine_setting_that_the_policy_does_not_support_is_rejected(
    tmp_path: Path, engine: dict[str, Any], headrace: dict[str, Any], said: str
) -> None:
    data = copy.deepcopy(MINIMAL)
    data["applications"][0]["args"]["llm_configs"][0]["engine_kwargs"] = engine
    data["applications"][0]["args"]["headrace"] |= headrace
    path = tmp_path / "unsupported.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError) as error:
        load_config(path, with_engine=False)
    assert said in str(error.value)
    assert "'model_source': 'org/m'" not in str(error.value), "the sentence stands alone"


@pytest.mark.parametrize(
    ("engine", "headrace"),
    [
        ({"pipeline_parallel_size": 2}, {"targets": {"ttft_s": 3.0, "tpot_s": 0.1}}),
        (NGRAM, {"targets": {"tpot_s": 0.1}}),
        (NGRAM, {"thresholds": {"policy": "nested_wait"}}),
        ({"kv_transfer_config": {"kv_role": "kv_both"}}, {"thresholds": {"policy": "wait"}}),
        ({}, {"controller": {"enabled": False, "profile": PROFILE}}), ({"data_parallel_size": 2}, {}),
        ({}, {"targets": {"tpot_s": 0.012}}), (NGRAM, {"targets": {"tpot_s": 0.008}}),
    ],
    ids=str,
)
def test_an_engine_setting_that_the_policy_goes_with_is_taken(
    tmp_path: Path, engine: dict[str, Any], headrace: dict[str, Any]
) -> None:
    data = copy.deepcopy(MINIMAL)
    data["applications"][0]["args"]["llm_configs"][0]["engine_kwargs"] = engine
    data["applications"][0]["args"]["headrace"] |= headrace
    path = tmp_path / "supported.yaml"
    path.write_text(yaml.safe_dump(data))
    assert load_config(path, with_engine=False).application.args.llm_configs[0].model_id == "m"


def test_the_documentation_s_configuration_is_taken_and_its_text_is_right() -> None:
    section = (REPOSITORY / "docs" / "configuration.md").read_text().partition("\n## ")[0]
    example = yaml.safe_load(section.partition("```yaml\n")[2].partition("```")[0])
    args = AppConfig.model_validate(example["args"], context=WITHOUT_ENGINE)
    assert args.settings_of("llama-2-7b").targets == Slo(3.0, 0.08)
    assert args.settings_of("chat").targets == Slo(1.0, 0.08)
    for key in type(args.headrace).model_fields:
        assert f"`{key}`" in section, "every key is told of"
