"""metrics.jsonl, TensorBoard, the summary and the screen show the same values under the same names."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.messages.steps import StepMetrics
from jobs.console import Progress
from jobs.training.metrics_file import METRICS_FILE, MetricsWriter, read_metrics
from jobs.training.run_watch import RunWatch
from jobs.training.train import summary
from support.training_job import text_corpus, tiny, train

pytestmark = pytest.mark.slow

TEXT = "\n\n".join(f"paragraph {i}: " + " ".join(str(i * j) for j in range(40)) for i in range(60))
STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two evaluations, two MTP modules and a balance loss, in two parts."""
    output = tmp_path_factory.mktemp("run")
    config = tiny(
        model={"num_nextn_predict_layers": 2},
        training={"steps": STEPS, "eval_interval": 2, "eval_rows": 2},
        balance={"sequence_weight": 0.5},
        checkpoint={"interval": 0},
    )
    train(config, text_corpus(config, TEXT), output)
    return output


def board(directory: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: values by tag and step, of the only run in a directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in directory.rglob("events.out.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def flat(line: dict[str, Any]) -> dict[str, float]:
    found = {}
    for name, value in line.items():
        if isinstance(value, list):
            found.update({f"{name}/{at}": inner for at, inner in enumerate(value, start=1)})
        elif isinstance(value, dict):
            found.update({f"{name}/{key}": inner for key, inner in value.items()})
        elif name != "step":
            found[name] = value
    return found


def test_tensorboard_has_all_of_the_metrics_in_one_run(run: Path) -> None:
    lines = read_metrics(run / METRICS_FILE)
    expected: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in flat(line).items():
            expected.setdefault(name, {})[line["step"]] = value
    shown = board(run / "tensorboard")
    assert shown.keys() == expected.keys()
    assert {"max_violation/1", "mtp_acceptance/1", "mtp_acceptance/2", "bits_per_byte"} <= shown.keys()
    for name, values in expected.items():
        assert shown[name].keys() == values.keys(), name
        assert shown[name] == pytest.approx(values, rel=1e-6), name


def test_an_evaluation_stands_where_it_happened(run: Path) -> None:
    lines = read_metrics(run / METRICS_FILE)
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4]
    assert [line["step"] for line in lines if "mtp_acceptance" in line] == [2, 4]
    assert [line["step"] for line in lines if "bits_per_byte" in line] == [4]


def test_a_run_that_goes_back_shows_each_step_once(tmp_path: Path) -> None:
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with MetricsWriter(tmp_path, first_step=first, tensorboard=True) as writer:
            for step in steps:
                writer.write({"step": step, "loss": float(10 * first + step), "layers": {"1": 1.0}})
    assert [line["loss"] for line in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 23, 24]
    assert board(tmp_path / "tensorboard")["loss"] == {1: 1, 2: 2, 3: 23, 4: 24}


def test_the_summary_has_the_names_and_values_of_the_metrics(run: Path) -> None:
    lines = read_metrics(run / METRICS_FILE)
    found, last, half = summary(run), lines[-1], lines[STEPS // 2 :]
    for name in ("step", "loss", "main_loss", "hosts_per_token", "validation_loss", "mtp_acceptance"):
        assert found[name] == last[name], name
    assert found["averaged_steps"] == "3-4"
    mean = sum(line["max_violation_mean"] for line in half) / len(half)
    assert found["max_violation_mean"] == pytest.approx(mean)
    assert "max_violation" not in found  # in the metrics that is by layer


def test_the_loss_is_what_is_minimised_on_the_screen_too(run: Path) -> None:
    line = read_metrics(run / METRICS_FILE)[-1]
    assert line["loss"] == pytest.approx(line["main_loss"] + 0.3 * line["mtp_loss"] + line["balance_loss"])
    assert line["loss"] > line["main_loss"] + 0.1
    step = StepMetrics(
        step=STEPS - 1,
        loss=line["main_loss"],
        mtp_loss=line["mtp_loss"],
        balance_loss=line["balance_loss"],
        learning_rate=0.1,
        grad_norm=1.0,
        scale=1.0,
        max_violation=(0.5, 1.0),
        tokens=100,
        seconds=1.0,
        hosts_per_token=1.0,
        bytes=0,
    )

    class Decided:
        def metrics(self, since: int) -> list[StepMetrics]:
            return [step]

    stream = io.StringIO()
    progress = Progress(STEPS, console=Console(file=stream, width=200), clock=lambda: math.pi)
    RunWatch(None, Decided(), 0, progress, mtp_weight=0.3)._show()  # type: ignore[arg-type]
    assert f"loss {line['loss']:.3f}  " in stream.getvalue()
    assert f"main loss {line['main_loss']:.3f}" in stream.getvalue()
