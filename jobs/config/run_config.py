"""The configuration of a run: one YAML file, validated completely before anything starts.

`raymoe config` prints the docstrings' descriptions of the fields as comments. The sections `model`, `balance`
and `cluster` are defined in their own packages.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from actors.messages.timeline import WARM_UP
from cluster.config import ClusterConfig, GpuShare, Reserved
from jobs.config.field_errors import Section
from model.config import BalanceConfig, ModelConfig
from model.optimizers.schedule import Schedule

_INT64 = (1 << 63) - 1
Size = Annotated[int, Field(strict=True, ge=1, le=(1 << 31) - 1)]
Count = Annotated[int, Field(strict=True, ge=1, le=_INT64)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=_INT64)]
Threads = Annotated[int, Field(strict=True, ge=1, le=1024)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Sharding = Literal["ddp", "fsdp"]
DTypeName = Literal["auto", "float32", "float64", "bfloat16"]


class MtpConfig(Section):
    """Multi-token prediction; the number of modules is model.num_nextn_predict_layers.

    Attributes:
        weight: lambda, the weight of the mean loss of the MTP modules (DeepSeek-V3: 0.3, then 0.1);
            a number, or a list of {step, value}, each value holding from its step on.
    """

    weight: Schedule = 0.3


class TrainingConfig(Section):
    """The optimizer, and how the work is divided.

    Attributes:
        steps: optimizer steps of the whole run.
        batch_size: rows of a step, over all workers and microbatches together.
        microbatch_size: rows of one forward pass; divides batch_size.
        microbatches_in_flight: microbatches that a worker runs at the same time, so that one computes while
            another's tokens are at the expert hosts.
        computing_at_once: how many of these compute at the same time, each with its share of the worker's
            threads; null takes one for each thread. With 1 they take turns, which is faster if the hosts have
            machines of their own: microbatches that compute together also wait together.
        sequence_length: tokens of a row, at most model.max_position_embeddings.
        learning_rate: peak of the learning rate.
        min_learning_rate_ratio: learning rate of the last step, at the end of the cosine, as a share of
            learning_rate.
        warmup_steps: steps over which the learning rate rises to its peak.
        weight_decay: decoupled weight decay (AdamW).
        beta1: decay of AdamW's first moment.
        beta2: decay of AdamW's second moment.
        epsilon: AdamW's epsilon.
        clip_norm: largest norm of the gradient of all parameters together; null does not clip.
        recompute: recompute activations in the backward pass, with less memory and more arithmetic.
        dtype: `auto`, `float32`, `float64` or `bfloat16`; `auto` is bfloat16 if workers and hosts are on
            GPUs, else float32. With bfloat16 the optimizer's values, gradients and moments are float32.
        seed: seed of the weights and of the order of the rows.
        workers: trunk workers (data parallel); each gets at least one microbatch of a step.
        trunk_sharding: `ddp`: every worker has the whole trunk; `fsdp`: its parameters, gradients and moments
            are sharded over the workers, which gather each block when it computes, for large trunks.
        threads: compute threads of a worker; null divides the machine's cores among the workers.
        min_workers: smallest number of workers with which a run continues after the loss of nodes; null waits
            for all of them.
        max_failures: worker processes that may die in the course of a run; each is restarted.
        cpus_per_worker: CPUs that Ray reserves for each worker.
        gpus_per_worker: GPUs that Ray reserves for each worker, which then computes on one; a fraction shares
            a GPU with others, 0 computes on CPUs.
        eval_interval: steps between evaluations on the held-out documents; 0 evaluates only at the end.
        eval_rows: held-out rows of each evaluation but the last, which takes all; null takes all.
        profile_steps: steps to record as a timeline, after two to warm up; 0 records none.
        tensorboard: write TensorBoard event files into the run's directory.
    """

    steps: Count = 200
    batch_size: Size = 8
    microbatch_size: Size = 4
    microbatches_in_flight: Size = 2
    computing_at_once: Size | None = None
    sequence_length: Size = 256
    learning_rate: Positive = 1e-3
    min_learning_rate_ratio: Share = 0.1
    warmup_steps: CountOrZero = 20
    weight_decay: NonNegative = 0.1
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    epsilon: Positive = 1e-8
    clip_norm: Positive | None = 1.0
    recompute: bool = False
    dtype: DTypeName = "auto"
    seed: CountOrZero = 0
    workers: Size = 1
    trunk_sharding: Sharding = "ddp"
    min_workers: Size | None = None
    max_failures: CountOrZero = 100
    threads: Threads | None = None
    cpus_per_worker: Reserved = 1.0
    gpus_per_worker: GpuShare = 0
    eval_interval: CountOrZero = 50
    eval_rows: Count | None = 64
    profile_steps: CountOrZero = 0
    tensorboard: bool = True


class DataConfig(Section):
    """The documents and the tokenizer.

    Attributes:
        path: a file, folder or glob of text, JSON, JSON lines or Parquet, also compressed (.gz, .zst); null
            is the source of the Python standard library, which every machine has.
        text_field: field or column with a document's text (JSON, JSON lines, Parquet).
        on_bad_record: `error` ends the run at a record that cannot be read, before it starts; `skip` leaves
            it out, and says how many there are.
        tokenizer: a tokenizer.json, or a folder with one; null trains a byte-level BPE of model.vocab_size
            tokens on the training documents.
        validation_fraction: share of the documents to hold out, at least one document; they are chosen by a
            hash of their names.
    """

    path: str | None = None
    text_field: str = "text"
    on_bad_record: Literal["error", "skip"] = "error"
    tokenizer: str | None = None
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05


class CheckpointConfig(Section):
    """When checkpoints are written and deleted.

    Attributes:
        interval: steps between checkpoints; 0 writes only one, after the last step.
        keep: number of checkpoints to keep; older ones are deleted.
    """

    interval: CountOrZero = 100
    keep: Count = 2


class RunConfig(Section):
    """The configuration of a run. Every section but `model` has defaults.

    Attributes:
        model: shape of the model, with the names of a DeepSeek-V3 config.json.
        balance: how the load of the routed experts is balanced.
        mtp: multi-token prediction; the number of modules is model.num_nextn_predict_layers.
        training: the optimizer, and how the work is divided.
        data: the documents and the tokenizer.
        checkpoint: when checkpoints are written and deleted.
        cluster: the expert hosts, and the channels to them.
    """

    model: ModelConfig
    balance: BalanceConfig = BalanceConfig()
    mtp: MtpConfig = MtpConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        problems = list(_conflicts(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def on_gpus(self) -> bool:
        """Whether all workers and hosts compute on GPUs."""
        hosts = self.cluster.gpus_per_host > 0 or not self.cluster.expert_hosts
        return self.training.gpus_per_worker > 0 and hosts

    @property
    def microbatches(self) -> int:
        """Number of microbatches of a step, over all workers."""
        return self.training.batch_size // self.training.microbatch_size


def _conflicts(config: RunConfig) -> list[str]:
    """Contradictions between valid fields; each line starts with the path of the field to change."""
    model, training, cluster = config.model, config.training, config.cluster
    problems = []
    if not model.moe_layers:
        problems.append(
            f"model.first_k_dense_replace ({model.first_k_dense_replace}) leaves no layer with routed "
            f"experts of model.num_hidden_layers ({model.num_hidden_layers}); lower it"
        )
    if training.batch_size % training.microbatch_size:
        problems.append(
            f"training.batch_size ({training.batch_size}) is not a multiple of training.microbatch_size "
            f"({training.microbatch_size}); choose a multiple"
        )
    elif config.microbatches < training.workers:
        problems.append(
            f"training.workers ({training.workers}) is more than the {config.microbatches} microbatches of a "
            "step (batch_size / microbatch_size); lower it, or lower training.microbatch_size"
        )
    if training.workers > 1 and 0 < training.gpus_per_worker < 1:
        problems.append(
            f"training.gpus_per_worker ({training.gpus_per_worker:g}) would have some of the "
            f"{training.workers} workers share a GPU, which NCCL sums no gradients on; set it to 1, or "
            "training.workers to 1"
        )
    if training.min_workers is not None and training.min_workers > training.workers:
        problems.append(
            f"training.min_workers ({training.min_workers}) is more than training.workers "
            f"({training.workers}); lower it"
        )
    if training.trunk_sharding == "fsdp" and training.microbatches_in_flight != 1:
        problems.append(
            f"training.microbatches_in_flight ({training.microbatches_in_flight}) has to be 1 where "
            "training.trunk_sharding is fsdp, which gathers each block for one pass at a time"
        )
    if training.profile_steps and training.steps <= WARM_UP:
        problems.append(
            f"training.profile_steps ({training.profile_steps}) begins after {WARM_UP} steps, and "
            f"training.steps is {training.steps}; raise that"
        )
    if training.sequence_length > model.max_position_embeddings:
        problems.append(
            f"training.sequence_length ({training.sequence_length}) is beyond model.max_position_embeddings "
            f"({model.max_position_embeddings}); lower the one or raise the other"
        )
    if cluster.expert_hosts > model.n_routed_experts:
        problems.append(
            f"cluster.expert_hosts ({cluster.expert_hosts}) is more than model.n_routed_experts "
            f"({model.n_routed_experts}): a host would own no expert; lower it"
        )
    if model.vocab_size < SMALLEST_VOCABULARY and config.data.tokenizer is None:
        problems.append(
            f"model.vocab_size ({model.vocab_size}) is too small for the byte-level tokenizer that is made "
            f"without data.tokenizer; use at least {SMALLEST_VOCABULARY}, or give data.tokenizer"
        )
    return problems


SMALLEST_VOCABULARY = 256 + 1  # all bytes, and the end of text


__all__ = [
    "SMALLEST_VOCABULARY",
    "CheckpointConfig",
    "DTypeName",
    "DataConfig",
    "MtpConfig",
    "RunConfig",
    "TrainingConfig",
]
