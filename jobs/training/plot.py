"""Plots a run: losses and balance over the steps, and the final load of the experts."""

from __future__ import annotations

from pathlib import Path

from errors import DataError
from jobs.training.held_out_evaluation import VALIDATION_FILE
from jobs.training.metrics_file import METRICS_FILE, read_metrics
from model.checkpoints.guarded_files import VALIDATION

PLOT_FILE = "training.png"
_TRAIN, _VALIDATION, _MTP = "#2a6f97", "#c1121f", "#8d99ae"


def plot_run(directory: Path) -> Path:
    """Draw `DIR/training.png` from a run's metrics and its last evaluation.

    Raises:
        DataError: The directory holds no metrics.
    """
    steps = read_metrics(directory / METRICS_FILE)
    if not steps:
        raise DataError(f"{directory} holds no {METRICS_FILE}: not the directory of a run")
    import matplotlib  # slow to import, and only this function draws

    matplotlib.use("agg")
    from matplotlib import pyplot

    numbers = [step["step"] for step in steps]
    figure, (losses, balance, load) = pyplot.subplots(1, 3, figsize=(16, 4.5), layout="constrained")

    raw = [step["main_loss"] for step in steps]
    losses.plot(numbers, raw, color=_TRAIN, lw=0.6, alpha=0.25)
    losses.plot(numbers, _running_mean(raw), color=_TRAIN, lw=1.5, label="training")
    if any(step["mtp_loss"] for step in steps):
        mtp = _running_mean([step["mtp_loss"] for step in steps])
        losses.plot(numbers, mtp, color=_MTP, lw=1.2, ls="--", label="training, MTP")
    judged = [step for step in steps if "validation_loss" in step]
    # The last evaluation is on all documents and the earlier ones on some: two curves.
    some = _changes(
        [(step["step"], step["validation_loss"]) for step in judged if "bits_per_byte" not in step]
    )
    everything = _changes(
        [(step["step"], step["validation_loss"]) for step in judged if "bits_per_byte" in step]
    )
    for points, label, marker in ((some, "held out, in part", "o"), (everything, "held out", "D")):
        if points:
            style = {"marker": marker, "ms": 4, "lw": 1, "color": _VALIDATION}
            losses.plot(*zip(*points, strict=True), label=label, **style)
    losses.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    losses.legend(frameon=False)

    for layer in steps[-1]["max_violation"]:
        raw = [step["max_violation"][layer] for step in steps]
        (line,) = balance.plot(numbers, _running_mean(raw), lw=1.2, label=f"layer {layer}")
        balance.plot(numbers, raw, lw=0.5, alpha=0.2, color=line.get_color())
    balance.axhline(0, color="black", lw=0.5)
    balance.set(xlabel="step", ylabel="(max - mean) / mean", title="MaxVio: the fullest expert, each step")
    balance.legend(frameon=False, fontsize="small")

    _draw_load(load, directory, list(steps[-1]["max_violation"]))
    path = directory / PLOT_FILE
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw_load(axes, directory: Path, layers: list[str]) -> None:  # type: ignore[no-untyped-def]
    axes.set(title="Expert load on held-out text (1 = even)", xlabel="expert", ylabel="layer")
    file = directory / VALIDATION_FILE
    if not file.exists():
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no validation yet", ha="center", va="center", transform=axes.transAxes)
        return
    loads = VALIDATION.json(file)["expert_load"]
    relative = [[value * len(row) / max(1, sum(row)) for value in row] for row in loads]
    image = axes.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    axes.set_yticks(range(len(layers)), layers)
    axes.figure.colorbar(image, ax=axes)


def _running_mean(values: list[float], window: int = 10) -> list[float]:
    """The mean of each value and the ones before it, at most `window` values."""
    parts = (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def _changes(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Points whose value differs from the one before."""
    return [point for i, point in enumerate(points) if i == 0 or point[1] != points[i - 1][1]]


__all__ = ["PLOT_FILE", "plot_run"]
