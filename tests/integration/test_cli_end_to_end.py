"""The `raymoe` commands one after the other on one real run, and their errors for bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from jobs.checkpoints.checkpoint_store import find_checkpoint, find_weights
from jobs.cli.app import app
from jobs.data.carried_files import CarriedFiles
from jobs.tools.demo import fresh_directory
from jobs.training.metrics_file import METRICS_FILE, read_metrics
from jobs.training.plot import PLOT_FILE
from support.foreign_model import change_json

pytestmark = [
    pytest.mark.timeout(540),
    pytest.mark.shares("ray"),
    pytest.mark.usefixtures("ray_cluster"),  # the commands find it running; they neither start nor stop one
    # Ray's own code warns of its own settings.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
PROMPT = "def add_argument(self"
# With four experts of two groups alone, transformers scores groups as the paper does.
SHAPE = {"model__n_routed_experts": 16, "model__num_experts_per_tok": 4}
runner = CliRunner()


def invoke(*arguments: str | Path, **settings: Any) -> Result:
    sets = [
        part for key, value in settings.items() for part in ("--set", f"{key.replace('__', '.')}={value}")
    ]
    return runner.invoke(app, [*map(str, arguments), *sets])


def result_of(*arguments: str | Path, **settings: Any) -> dict[str, Any]:
    """The one JSON object that a command prints."""
    done = invoke(*arguments, "--json", **settings)
    assert done.exit_code == 0, done.output
    values: dict[str, Any] = json.loads(done.stdout)
    return values


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the preset tiny with two expert hosts, by the demo's own entry point."""
    output = tmp_path_factory.mktemp("demo") / "run"
    shape = result_of("config", "tiny", **SHAPE)
    settings = {f"model.{name}": value for name, value in shape["model"].items()}
    settings |= {f"training.{name}": value for name, value in shape["training"].items()}
    settings |= {"data.path": corpus, "training.steps": 30, "checkpoint.interval": 15}
    settings["training.profile_steps"] = 2
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={_yaml(value)}")]
    command = [sys.executable, "-m", "jobs.tools.demo", "--output", str(output), *sets]
    done = subprocess.run(command, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for shown in ("held-out bits per byte", "zlib -9", "tokens per second", "MaxVio", "MTP acceptance"):
        assert shown in done.stdout
    assert "class Queue" in done.stdout
    return output


def _yaml(value: Any) -> str:
    return str(value) if isinstance(value, Path | str) else json.dumps(value)


def test_the_demo_leaves_a_run_and_its_picture(run: Path) -> None:
    assert [line["step"] for line in read_metrics(run / METRICS_FILE)] == list(range(1, 31))
    assert (run / PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    assert not (run / "ray_train").exists()  # Ray Train's own record of the run
    assert fresh_directory(run) == run.with_name("run-2")
    assert fresh_directory(run / "new") == run / "new"


def test_the_timeline_shows_lanes_and_hosts_at_work(run: Path) -> None:
    events = json.loads((run / "profile" / "timeline.json").read_text())["traceEvents"]
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert sorted(processes.values()) == ["host-0", "host-1", "worker-0"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {span["args"]["step"] for span in spans} == {2, 3}
    work = {(processes[span["pid"]], span["name"].split()[0]) for span in spans}
    assert work >= {
        ("worker-0", "forward"),
        ("worker-0", "backward"),
        ("worker-0", "wait"),
        ("worker-0", "apply"),
    }
    assert work >= {(host, phase) for host in ("host-0", "host-1") for phase in ("forward", "backward")}


def test_eval_finds_what_training_found(run: Path) -> None:
    """`eval` in one process finds the loss that training found with expert hosts, lanes and channels."""
    trained = json.loads((run / "validation.json").read_text())
    judged = result_of("eval", run)
    assert judged["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    assert judged["bits_per_byte"] == pytest.approx(trained["bits_per_byte"], rel=1e-5)
    assert judged["mtp_acceptance"] == pytest.approx(trained["acceptance"], abs=0.01)
    assert judged["zlib_bits_per_byte"] > 0


def test_generation_is_that_of_transformers_on_the_export(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = result_of("generate", run, "--prompt", PROMPT, "--max-tokens", "12")
    result_of("export", run, tmp_path / "hf")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    theirs = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert theirs == ours["text"]


def test_an_export_comes_back_and_trains_on(run: Path, corpus: Path, tmp_path: Path) -> None:
    result_of("export", run, tmp_path / "hf", "--mtp")
    result_of("import", tmp_path / "hf", tmp_path / "weights")
    one, other = (
        result_of("generate", place, "--prompt", PROMPT, "--max-tokens", "8")["text"]
        for place in (run, tmp_path / "weights")
    )
    assert one == other
    shape = {"--preset": "tiny", "--init": tmp_path / "weights", "--output": tmp_path / "more"}
    options = [part for pair in shape.items() for part in pair]
    change_json(tmp_path / "weights" / "generation_config.json", {"temperature": 0.7})
    change_json(tmp_path / "weights" / "config.json", {"eos_token_id": [0, 5], "use_cache": True})
    changed = {**SHAPE, "training__steps": 2, "training__tensorboard": "false"}
    shutil.copytree(corpus, tmp_path / "text")
    (tmp_path / "text" / "bad.jsonl").write_text("not json\n")
    changed["data__on_bad_record"] = "skip"
    more = result_of("train", *options, data__path=tmp_path / "text", **changed)
    assert (more["step"], more["skipped_records"]) == (2, 1)
    first = read_metrics(tmp_path / "more" / METRICS_FILE)[0]["main_loss"]
    last = read_metrics(run / METRICS_FILE)[-1]["main_loss"]
    assert abs(first - last) < 1.0  # and not the 6.2 of random weights
    assert find_checkpoint(tmp_path / "more").name == "step-00000002"
    given, kept = (CarriedFiles.of_model(find_weights(tmp_path / name)) for name in ("weights", "more"))
    assert kept.files == given.files
    assert {name: kept.config[name] for name in given.config} == given.config


BAD = {
    "unknown field": ({"training__stepz": 1}, 2, "did you mean training.steps?"),
    "wrong type": ({"model__hidden_size": "wide"}, 2, "model.hidden_size"),
    "groups": ({"model__n_group": 3}, 2, "n_routed_experts (8) must be a multiple of n_group (3)"),
    "reach": ({"model__num_experts_per_tok": 5}, 2, "num_experts_per_tok (5) exceeds the 4 experts"),
    "missing file": ({"data__path": "/no/such/file.txt"}, 2, "/no/such/file.txt does not exist"),
    "too few CPUs": ({"training__cpus_per_worker": 64}, 1, "training.cpus_per_worker (64)"),
    "host without GPU": (
        {"cluster__expert_hosts": 1, "cluster__gpus_per_host": 1},
        1,
        "cluster.gpus_per_host (1)",
    ),
    "channel": (
        {"cluster__expert_hosts": 1, "cluster__channel": "local"},
        2,
        "cluster.channel: local stays within a process",
    ),
    "worker without GPU": ({"training__gpus_per_worker": 0.5}, 1, "0 GPUs free, and 0.5 are asked for"),
}


@pytest.mark.parametrize(("settings", "code", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input_to_train(tmp_path: Path, settings: dict[str, Any], code: int, said: str) -> None:
    output = tmp_path / "run"
    done = invoke("train", "--preset", "tiny", "--output", output, "--json", **settings)
    _refused(done, code, said)
    assert not output.exists()


def _refused(done: Result, code: int, said: str) -> None:
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert said in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("empty.txt", b"", "holds 0 documents with text"),
        ("short.jsonl", b'{"text": "a"}\n{"text": "b"}\n', "fill no row"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"\n', "broken.jsonl, line 2"),
        ("binary.txt", b"\xff\xfe\x00" * 900, "not UTF-8"),
    ],
)
def test_bad_corpora(tmp_path: Path, name: str, text: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(text)
    output = tmp_path / "run"
    done = invoke("train", "--preset", "tiny", "--output", output, data__path=tmp_path / name)
    _refused(done, 2, said)
    assert not output.exists()


def test_a_checkpoint_of_another_shape(run: Path, tmp_path: Path) -> None:
    done = invoke(
        *("train", "--preset", "tiny", "--init", run, "--output", tmp_path / "run"),
        **{**SHAPE, "model__hidden_size": 64},
    )
    _refused(done, 2, "model.hidden_size (64, there 32)")
    assert not (tmp_path / "run").exists()


def test_a_host_that_cannot_start_ends_the_run(run: Path, corpus: Path, tmp_path: Path) -> None:
    """The host's weights are damaged; the driver does not read them."""
    result_of("export", run, tmp_path / "hf", "--mtp")
    shard = next((tmp_path / "hf").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:2000])
    done = invoke(
        *("train", "--preset", "tiny", "--init", tmp_path / "hf", "--output", tmp_path / "run"),
        data__path=corpus,
        cluster__expert_hosts=1,
        **SHAPE,
    )
    _refused(done, 2, shard.name)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_is_not_written_over(run: Path) -> None:
    before = (run / METRICS_FILE).read_bytes()
    _refused(invoke("train", "--preset", "tiny", "--output", run), 2, "holds a run already")
    assert (run / METRICS_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "RUN", "--prompt", "x " * 300], "max_position_embeddings"),
        (["eval", "RUN", "--data", "/no/such.txt"], "/no/such.txt does not exist"),
        (["eval", "RUN", "--sequence-length", "4096"], "max_position_embeddings (128)"),
        (["export", "RUN", "RUN"], "exists already"),
        (["export", "RUN", "NEW", "--dtype", "int3"], "int3"),
        (["import", "RUN", "NEW"], "is a run's directory, which needs no import"),
        (
            ["train", "--preset", "tiny", "--init", "deepseek-ai/DeepSeek-V3", "--output", "NEW"],
            "hf download deepseek-ai/DeepSeek-V3",
        ),
    ],
)
def test_bad_input_to_the_other_commands(run: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    names = {"RUN": str(run), "NEW": str(tmp_path / "new")}
    done = invoke(*[names.get(part, part) for part in arguments], "--json")
    _refused(done, 2, names.get(said, said))
    assert not (tmp_path / "new").exists()
