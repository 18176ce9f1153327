"""The run's configuration: loading, overriding, round trips, and errors that name field and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from errors import ConfigError, UsageError
from jobs.config.config_file import load_config, write_config
from jobs.config.presets import PRESETS, preset
from jobs.config.run_config import RunConfig
from jobs.config.yaml_text import commented_yaml, parse_yaml


def _problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(preset_name="tiny", overrides=overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", PRESETS)
def test_printed_configuration_reads_back_as_itself(name: str, tmp_path: Path) -> None:
    write_config(preset(name), tmp_path / "run.yaml")
    assert load_config(path=tmp_path / "run.yaml") == preset(name)


@pytest.mark.parametrize("name", PRESETS)
def test_every_field_has_a_comment(name: str) -> None:
    lines = commented_yaml(preset(name)).splitlines()
    checked = 0

    def check(section: BaseModel, at: int, depth: int) -> None:
        nonlocal checked
        for field in type(section).model_fields:
            at = next(i for i in range(at, len(lines)) if lines[i].startswith(f"{'  ' * depth}{field}:"))
            assert lines[at - 1].startswith(f"{'  ' * depth}# "), f"{field} is printed without a comment"
            checked += 1
            inner = getattr(section, field)
            if isinstance(inner, BaseModel):
                check(inner, at, depth + 1)

    check(preset(name), 0, 0)
    assert checked > 90
    comments = [line for line in lines if line.lstrip().startswith("#")]
    assert not [line for line in comments if {"None", "True", "False"} & set(line.split())]


def test_overrides_are_yaml_and_apply_in_order() -> None:
    config = load_config(
        preset_name="tiny",
        overrides=[
            "training.steps=7",
            "training.steps=8",
            "training.learning_rate=1e-3",
            "training.clip_norm=null",
            "mtp.weight=[{step: 0, value: 0.3}, {step: 5, value: 0.1}]",
            "data.text_field=no",
        ],
    )
    assert config.training.steps == 8
    assert config.training.learning_rate == 1e-3
    assert config.training.clip_norm is None
    assert config.data.text_field == "no"
    assert config.to_dict()["mtp"]["weight"] == [{"step": 0, "value": 0.3}, {"step": 5, "value": 0.1}]


def test_a_file_may_leave_out_what_has_a_default(tmp_path: Path) -> None:
    only_model = RunConfig.from_dict({"model": preset("demo").model.model_dump(mode="json")})
    file = tmp_path / "model.yaml"
    file.write_text(commented_yaml(only_model).split("\n\n")[0] + "\n")
    assert load_config(path=file) == only_model


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.step=3", "training.step: unknown field; did you mean training.steps?"),
        ("trainin.steps=3", "trainin: unknown field; did you mean training?"),
        ("model.hiden_size=3", "model.hiden_size: unknown field; did you mean model.hidden_size?"),
        ("steps=3", "steps: unknown field; did you mean training.steps?"),
        ("vocab=3", "vocab: unknown field; the configuration has " + ", ".join(RunConfig.model_fields)),
        (
            "model.warmup_step=3",
            "model.warmup_step: unknown field; did you mean training.warmup_steps?",
        ),
        ("threads_per_hosts=3", "threads_per_hosts: unknown field; did you mean cluster.threads_per_host?"),
        ("training.steps=0", "training.steps: 0 should be greater than or equal to 1"),
        (
            "cluster.gpus_per_host=1e-9",
            "cluster.gpus_per_host: Ray reserves no finer shares than 0.0001; round it",
        ),
        ("training.steps=true", "training.steps: True should be a valid integer"),
        (
            "training.dtype=fp16",
            "training.dtype: 'fp16' should be 'auto', 'float32', 'float64' or 'bfloat16'",
        ),
        ("training=3", "training: 3 is not a mapping; write `field: value` lines"),
        (
            "training.steps.x=3",
            "--set training.steps.x: training.steps is a value, not a section with fields",
        ),
        (
            "training.steps",
            "--set 'training.steps': write section.field=value, such as cluster.expert_hosts=2",
        ),
        ("training.steps= ", "--set training.steps: is empty; write training.steps=VALUE"),
        ("data.path=", "--set data.path: is empty; write data.path=VALUE"),
    ],
)
def test_a_mistake_is_one_line_with_path_and_fix(override: str, expected: str) -> None:
    assert _problems(override) == [expected]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("training.steps", 10**26),
        ("training.seed", 10**23),
        ("training.batch_size", 2**31),
        ("training.learning_rate", ".inf"),
        ("training.learning_rate", ".nan"),
        ("training.threads", 100000),
        ("training.cpus_per_worker", ".inf"),
        ("model.vocab_size", 10**12),
        ("model.num_hidden_layers", 2**31),
        ("model.rope_theta", ".inf"),
        ("mtp.weight", -0.1),
        ("balance.update_rate", "[{step: 0, value: 0.1}, {step: 9, value: -0.1}]"),
        ("balance.auxiliary_weight", ".nan"),
        ("balance.device_weights.expert", ".inf"),
        ("checkpoint.interval", 10**26),
        ("cluster.threads_per_host", 100000),
        ("cluster.cpus_per_host", ".inf"),
        ("cluster.call_timeout", 86401),
        ("cluster.start_timeout", ".inf"),
    ],
)
def test_a_number_that_nothing_could_be_done_with_is_refused(field: str, value: object) -> None:
    (line,) = _problems(f"{field}={value}")
    assert line.startswith(field)
    assert "should be" in line


def test_a_vocabulary_too_small_for_bytes_needs_a_tokenizer_of_its_own() -> None:
    (line,) = _problems("model.vocab_size=256")
    assert line.startswith("model.vocab_size (256)")
    assert "give data.tokenizer" in line
    given = ["model.vocab_size=256", "data.tokenizer=words.json"]
    assert load_config(preset_name="tiny", overrides=given).model.vocab_size == 256
    assert load_config(preset_name="tiny", overrides=["model.vocab_size=257"]).data.tokenizer is None


def test_all_problems_are_told_at_once() -> None:
    lines = _problems("training.steps=-1", "model.vocab_size=x", "cluster.expert_host=2")
    assert [line.split(":")[0] for line in lines] == [
        "model.vocab_size",
        "training.steps",
        "cluster.expert_host",
    ]


@pytest.mark.parametrize(
    ("override", "field", "fix"),
    [
        ("training.batch_size=3", "training.batch_size", "choose a multiple"),
        ("training.workers=9", "training.workers", "lower"),
        ("training.sequence_length=4096", "training.sequence_length", "model.max_position_embeddings"),
        ("cluster.expert_hosts=9", "cluster.expert_hosts", "lower it"),
        ("model.num_experts_per_tok=5", "model.num_experts_per_tok", "raise topk_group"),
        ("model.n_group=3", "model.n_routed_experts", "multiple of n_group"),
        ("model.group_score_experts=3", "model.group_score_experts", "lower it"),
        ("mtp.weight=[{step: 2, value: 1}]", "mtp.weight", "step 0"),
    ],
)
def test_fields_that_do_not_go_together_name_the_one_to_change(override: str, field: str, fix: str) -> None:
    (line,) = _problems(override)
    assert line.startswith(field)
    assert fix in line


def test_a_run_needs_a_layer_with_routed_experts() -> None:
    dense = "model.first_k_dense_replace=2"  # of two layers
    assert load_config(preset_name="tiny", overrides=[dense]).model.moe_layers == (2,)  # the MTP module's
    (line,) = _problems(dense, "model.num_nextn_predict_layers=0")
    assert line.startswith("model.first_k_dense_replace (2) leaves no layer with routed experts")


def test_an_entry_of_a_schedule_is_named_by_its_index() -> None:
    lines = _problems("mtp.weight=[{step: 0, valu: 1}]")
    assert "mtp.weight[0].valu: unknown field; did you mean mtp.weight[0].value?" in lines


def test_file_and_preset_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config and --preset"):
        load_config(path=tmp_path / "x.yaml", preset_name="tiny")


def test_a_missing_file_and_broken_yaml_say_where(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml: cannot read"):
        load_config(path=tmp_path / "none.yaml")
    file = tmp_path / "broken.yaml"
    file.write_text("model: {}\ntraining: [1\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml, line 3"):
        load_config(path=file)
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds no mapping"):
        load_config(path=file)


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"line 2.*'a' is given twice"):
        parse_yaml("a: 1\na: 2\n", "file")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.5", 1.5),
        ("-2", -2),
        ("0", 0),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("007", "007"),
    ],
)
def test_scalars_are_read_as_yaml_1_2_does(text: str, value: object) -> None:
    read = parse_yaml(text, "here")
    assert read == value
    assert type(read) is type(value)


def test_strings_that_look_like_numbers_survive_the_round_trip(tmp_path: Path) -> None:
    values = preset("tiny").to_dict()
    values["data"] = {"path": "1e5", "text_field": "no"}
    config = RunConfig.from_dict(values)
    write_config(config, tmp_path / "run.yaml")
    assert load_config(path=tmp_path / "run.yaml") == config


@pytest.mark.parametrize(
    "interface", ["eth0", "host.example", "300.1.1.1", "127.0.0.1:80", "10.0.0.0/8", "::g"]
)
def test_an_interface_that_is_no_address_is_refused(interface: str) -> None:
    (line,) = _problems(f"cluster.interface='{interface}'")
    assert line.startswith(f"cluster.interface: {interface!r} is no address; give an IP address")


@pytest.mark.parametrize("interface", ["node", "localhost", "0.0.0.0", "'::'", "'[fd00::1]'", "null"])
def test_interfaces_to_listen_on(interface: str) -> None:
    chosen = load_config(preset_name="tiny", overrides=[f"cluster.interface={interface}"])
    assert chosen.cluster.interface == (None if interface == "null" else interface.strip("'"))


def test_what_an_expert_host_asks_for_is_a_custom_resource() -> None:
    chosen = load_config(preset_name="tiny", overrides=["cluster.host_resources.expert_host=1"])
    assert chosen.cluster.host_resources == {"expert_host": 1.0}
    for resources, why in (
        ("{CPU: 1}", "no custom resource"),
        ("{expert: 1.5}", "whole"),
        ("{e: 0}", "above"),
    ):
        (line,) = _problems(f"cluster.host_resources={resources}")
        assert line.startswith("cluster.host_resources")
        assert why in line or "should be" in line
