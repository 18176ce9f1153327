"""`raymoe train`: starts coordinator, expert hosts and Ray Train's workers, and summarizes the run."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from actors.messages.timeline import FOLDER, merge
from actors.rpc.coordinator_client import CoordinatorClient
from errors import CheckpointError, ConfigError
from jobs.checkpoints.checkpoint_store import CheckpointStore, find_checkpoint, find_weights, read_state
from jobs.checkpoints.loaded_model import note_unused
from jobs.config.config_file import write_config
from jobs.config.device_and_dtype import check_dtype
from jobs.config.hub_names import hub_hint
from jobs.config.run_config import RunConfig, TrainingConfig
from jobs.console import Progress
from jobs.data.carried_files import CarriedFiles
from jobs.data.corpus import PreparedData, prepare
from jobs.data.corpus_check import check_corpus
from jobs.fleet.expert_hosts import check_transport, on_loopback
from jobs.fleet.fleet import Fleet
from jobs.fleet.ray_session import ResourceNeeds, ray_session
from jobs.fleet.stop_signals import StopSignals
from jobs.training.actor_builders import build_coordinator, build_host
from jobs.training.held_out_evaluation import VALIDATION_FILE
from jobs.training.metrics_file import METRICS_FILE, read_metrics
from jobs.training.ray_worker import WorkerSettings, train_worker
from jobs.training.run_directory import run_directory
from jobs.training.run_start import RunStart
from jobs.training.run_watch import RunWatch, run_events
from model.checkpoints.guarded_files import VALIDATION, is_there
from model.checkpoints.sources import PretrainedSource

_GROUP_SECONDS = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Seconds that Ray Train's workers have to start; its default of a minute is too short on a busy machine."""


def train(
    config: RunConfig,
    *,
    output: Path,
    resume: bool = False,
    init: Path | None = None,
    address: str | None = None,
    progress: Progress | None = None,
    stop: StopSignals | None = None,
    debug: bool = False,
) -> dict[str, Any]:
    """Train until the last step, or until Ctrl-C, after which a checkpoint is written.

    Args:
        config: The run's configuration.
        output: The run's directory; on a cluster of several machines, on storage that all of them share.
        resume: Resume from the latest checkpoint in `output`.
        init: Start with the weights of this checkpoint or Hugging Face directory.
        address: Address of a running Ray cluster; None starts one.
        progress: Shows the steps.
        stop: Handles signals of the command while it starts and ends.
        debug: Show the output of actors.

    Returns:
        A summary: losses, bits per byte, speed, balance, draft acceptance, paths.

    Raises:
        RaymoeError: Some process of the run failed, with its error text.
    """
    check_dtype(config.training.dtype, on_gpus=config.on_gpus)
    check_transport(config.cluster)
    if config.data.path is not None:  # it may be resumed from another working directory
        values = config.to_dict()
        values["data"]["path"] = os.path.abspath(os.path.expanduser(config.data.path))
        config = RunConfig.from_dict(values)
    with run_directory(output) as output:
        return _train(
            config,
            output=output,
            resume=resume,
            init=init,
            address=address,
            progress=progress,
            stop=stop or StopSignals(),
            debug=debug,
        )


def _train(
    config: RunConfig,
    *,
    output: Path,
    resume: bool,
    init: Path | None,
    address: str | None,
    progress: Progress | None,
    stop: StopSignals,
    debug: bool,
) -> dict[str, Any]:
    note = None if progress is None else progress.note
    begin, tokenizer = _start(config, output, resume=resume, init=init, note=note)
    if begin.step >= config.training.steps:
        raise ConfigError(
            f"training.steps is {config.training.steps}, and {begin.weights} has {begin.step} steps behind "
            "it: raise training.steps to go on"
        )
    check_corpus(config, tokenizer=tokenizer)
    if begin.weights is not None:
        CarriedFiles.of_model(begin.weights)  # which are read again once Ray has started
    with ray_session(_needs(config), address=address, debug=debug, tell=note) as embedded:
        stop.check()
        if embedded:
            config = config.model_copy(update={"cluster": on_loopback(config.cluster)})
        data = prepare(config, tokenizer=tokenizer, note=note)
        if begin.weights is not None:
            data = data.carrying(begin.weights)
        write_config(config, output / "config.yaml")
        shutil.rmtree(output / FOLDER, ignore_errors=True)  # left by the run before it was resumed
        began = time.perf_counter()
        interrupted = _run(config, data, begin, output, progress, stop)
        timeline = merge(output / FOLDER) if config.training.profile_steps else None
        if timeline is not None and progress is not None:
            progress.note(f"timeline in {timeline}; open it with chrome://tracing or ui.perfetto.dev")
        return {
            **summary(output),
            "zlib_bits_per_byte": data.held_out.zlib_bits_per_byte,
            "seconds": time.perf_counter() - began,
            "interrupted": interrupted,
            **({"skipped_records": data.skipped} if config.data.on_bad_record == "skip" else {}),
            "checkpoint": str(find_checkpoint(output)),
            "output": str(output),
            **({} if timeline is None else {"timeline": str(timeline)}),
        }


def summary(output: Path) -> dict[str, Any]:
    """A summary of a run from its files: names and meanings are those of `metrics.jsonl`.

    Losses and `hosts_per_token` are of the last step. Of `averaged_steps`, the second half of all steps, are
    the median of `tokens_per_second` and the mean of `max_violation_mean`, MaxVio's mean over the layers.
    """
    steps = read_metrics(output / METRICS_FILE)
    values: dict[str, Any] = {}
    if steps:
        last, half = steps[-1], steps[len(steps) // 2 :]
        speeds = sorted(step["tokens_per_second"] for step in half)
        values = {
            "step": last["step"],
            "loss": last["loss"],
            "main_loss": last["main_loss"],
            "hosts_per_token": last["hosts_per_token"],
            "averaged_steps": f"{half[0]['step']}-{last['step']}",
            "tokens_per_second": speeds[len(speeds) // 2],
            "max_violation_mean": sum(step["max_violation_mean"] for step in half) / len(half),
        }
    file = output / VALIDATION_FILE
    if file.exists():
        judged = VALIDATION.json(file)
        values["validation_loss"] = judged["loss"]
        values["bits_per_byte"] = judged["bits_per_byte"]
        values["mtp_acceptance"] = judged["acceptance"]
    return values


def _start(
    config: RunConfig,
    output: Path,
    *,
    resume: bool,
    init: Path | None,
    note: Callable[[str], None] | None = None,
) -> tuple[RunStart, Path | None]:
    """Where the run starts, and the tokenizer of its weights."""
    name = uuid.uuid4().hex[:12]
    store = CheckpointStore(output / "checkpoints")
    metrics = output / METRICS_FILE
    if not resume and (store.complete() or (metrics.exists() and metrics.stat().st_size)):
        raise ConfigError(f"{output} holds a run already; use --resume {output}, or another --output")
    if resume:
        if output.parent.name == "checkpoints":
            run = output.parent.parent
            raise ConfigError(f"--resume {output} is one checkpoint; resume the run: --resume {run}")
        checkpoint = find_checkpoint(output)
        begin = RunStart(run=name, step=read_state(checkpoint).step, weights=checkpoint, moments=True)
    elif init is not None:
        if not init.expanduser().exists():
            raise CheckpointError(
                f"--init {init} does not exist; give a checkpoint, a run's directory or a Hugging Face "
                f"directory{hub_hint(init)}"
            )
        init = init.expanduser().resolve()  # hosts and workers have other working directories
        weights = find_weights(init)
        source = PretrainedSource(weights)
        note_unused(source, note or (lambda _: None))
        _check_shape(config, source)
        begin = RunStart(run=name, weights=weights)
    else:
        return RunStart(run=name), None
    assert begin.weights is not None
    tokenizer = begin.weights / "tokenizer.json"
    if is_there(tokenizer):
        return begin, tokenizer
    if config.data.tokenizer is None:
        raise CheckpointError(
            f"{begin.weights} has no tokenizer.json, and a new one would not fit its weights: set "
            "data.tokenizer"
        )
    return begin, None


def _needs(config: RunConfig) -> ResourceNeeds:
    training, cluster = config.training, config.cluster
    workers = f"training.workers ({training.workers}) x training."
    hosts = f"cluster.expert_hosts ({cluster.expert_hosts}) x cluster."
    return ResourceNeeds(
        cpus=training.workers * training.cpus_per_worker + cluster.expert_hosts * cluster.cpus_per_host,
        why=f"{workers}cpus_per_worker ({training.cpus_per_worker:g}) + {hosts}cpus_per_host"
        f" ({cluster.cpus_per_host:g})",
        gpus=training.workers * training.gpus_per_worker + cluster.expert_hosts * cluster.gpus_per_host,
        why_gpus=f"{workers}gpus_per_worker ({training.gpus_per_worker:g}) + {hosts}gpus_per_host"
        f" ({cluster.gpus_per_host:g})",
    )


def _resources(training: TrainingConfig) -> dict[str, float]:
    gpus = {"GPU": training.gpus_per_worker} if training.gpus_per_worker else {}
    return {"CPU": training.cpus_per_worker, **gpus}


def _check_shape(config: RunConfig, source: PretrainedSource) -> None:
    # As in a config.json, where the number of experts that score a group is never left to a default.
    theirs, ours = source.config.to_hf(), config.model.to_hf()
    other = [
        f"model.{name} ({ours[name]}, there {theirs[name]})"
        for name in type(config.model).model_fields
        if ours[name] != theirs[name]
    ]
    if other:
        raise CheckpointError(
            f"--init {source.directory} is a model of another shape: {', '.join(other[:4])}"
        )


def _run(
    config: RunConfig,
    data: PreparedData,
    begin: RunStart,
    output: Path,
    progress: Progress | None,
    stop: StopSignals,
) -> bool:
    """Start all processes, train, and end all processes; return whether Ctrl-C ended the run."""
    train_state = output / "ray_train"  # Ray Train's own record of the run, of which nothing is read again
    with ExitStack() as stack:
        shutil.rmtree(train_state, ignore_errors=True)
        stack.callback(shutil.rmtree, train_state, ignore_errors=True)
        fleet = Fleet(
            config.cluster,
            coordinator=partial(build_coordinator, config, begin, output),
            host=partial(build_host, config, begin, output=output),
            name=output.name,
        )
        stack.callback(fleet.close)
        address = fleet.open()
        if progress is not None and config.cluster.expert_hosts:
            progress.note(
                f"coordinator at {address.removeprefix('grpc:')}, for raymoe status, scale and drain"
            )
        coordinator = CoordinatorClient(address, timeout=config.cluster.call_timeout)
        stack.callback(coordinator.close)
        settings = WorkerSettings(
            config=config.to_dict(), data=data, start=begin, output=str(output), coordinator=address
        )
        training = config.training
        os.environ.setdefault(_GROUP_SECONDS, str(config.cluster.start_timeout))
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"worker": settings},
            scaling_config=ScalingConfig(
                num_workers=training.workers
                if training.min_workers is None
                else (training.min_workers, training.workers),
                use_gpu=training.gpus_per_worker > 0,
                resources_per_worker=_resources(training),
                placement_strategy="SPREAD",
            ),
            # Gradients are summed on their device; loads, evaluations and agreements on the CPU.
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if training.gpus_per_worker else "gloo"),
            run_config=TrainRunConfig(
                name=output.name,
                storage_path=str(train_state),
                failure_config=FailureConfig(max_failures=training.max_failures),
            ),
        )
        events = run_events(address, output, None if progress is None else progress.note, stack)
        watch = RunWatch(trainer, coordinator, begin.step, progress, events, mtp_weight=config.mtp.weight)
        with stop.running():
            return watch.until_done()


__all__ = ["summary", "train"]
