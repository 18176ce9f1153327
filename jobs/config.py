"""The configuration of a run: one YAML file, checked as a whole before anything starts.

Each field's description is what `raymoe config` prints as its comment. Sections that belong to a
layer below (`model`, `balance`, `cluster`) are defined there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.config import ClusterConfig
from jobs.config_errors import explain
from model.config import BalanceConfig, ModelConfig, Schedule

Count = Annotated[int, Field(strict=True, ge=1)]
CountOrNone = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
DTypeName = Literal["auto", "float32", "float64", "bfloat16"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=False)


class MtpConfig(_Section):
    """Multi-token prediction; the number of modules is `model.num_nextn_predict_layers`."""

    weight: Schedule = Field(
        default=0.3,
        description="λ, the weight of the mean loss of the MTP modules (DeepSeek-V3: 0.3, then 0.1). "
        "A number, or a list of {step, value}: the value from that step on.",
    )


class TrainingConfig(_Section):
    """What the optimizer does, and how the work is cut up."""

    steps: Count = Field(default=200, description="Optimizer steps of the whole run.")
    batch_size: Count = Field(default=8, description="Rows of a step, over all workers and microbatches together.")
    microbatch_size: Count = Field(
        default=4, description="Rows that go through the model at once; divides batch_size."
    )
    microbatches_in_flight: Count = Field(
        default=2,
        description="Microbatches a worker runs at once: one computes while another's tokens travel.",
    )
    sequence_length: Count = Field(default=256, description="Tokens of a row, at most model.max_position_embeddings.")
    learning_rate: Positive = Field(default=1e-3, description="Peak of the learning rate.")
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="Where the cosine ends at the last step, as a share of learning_rate."
    )
    warmup_steps: CountOrNone = Field(
        default=20, description="Steps over which the learning rate rises from 0 to its peak."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.1, description="Decoupled weight decay (AdamW).")
    beta1: Fraction = Field(default=0.9, description="Decay of AdamW's first moment.")
    beta2: Fraction = Field(default=0.95, description="Decay of AdamW's second moment.")
    epsilon: Positive = Field(default=1e-8, description="AdamW's ε.")
    clip_norm: Positive | None = Field(
        default=1.0, description="Largest norm of the gradient of all parameters together; null does not clip."
    )
    recompute: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, about a third more arithmetic.",
    )
    dtype: DTypeName = Field(
        default="auto",
        description="auto, float32, float64 or bfloat16; auto is float32 on CPUs, bfloat16 on GPUs.",
    )
    seed: CountOrNone = Field(default=0, description="Seeds the weights and the order of the rows.")
    workers: Count = Field(
        default=1, description="Trunk workers (data parallel); every one gets at least a microbatch."
    )
    threads: Count | None = Field(
        default=None,
        description="Compute threads of a worker; null shares out the machine's cores among its processes.",
    )
    cpus_per_worker: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="CPUs that Ray sets aside for a worker; for placement only, it limits nothing."
    )
    eval_interval: CountOrNone = Field(
        default=50, description="Steps between evaluations on the held-out documents; 0: after the last step only."
    )
    eval_rows: Count | None = Field(
        default=64, description="Held-out rows of an evaluation during training; null: all. The last one takes all."
    )
    tensorboard: bool = Field(default=True, description="Write TensorBoard event files into the run's directory.")


class DataConfig(_Section):
    """Where the documents come from."""

    path: str | None = Field(
        default=None,
        description="A file, folder or glob of text, JSONL (.jsonl, .jsonl.gz, .ndjson) or Parquet; "
        "null: the source of the Python standard library, which every machine has.",
    )
    text_field: str = Field(
        default="text", description="The field or column that holds a document's text (JSONL, Parquet)."
    )
    tokenizer: str | None = Field(
        default=None,
        description="A tokenizer.json, or a folder with one; null trains a byte-level BPE of "
        "model.vocab_size tokens on the training documents.",
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.02,
        description="Share of the documents that is held out, at least one; chosen by a hash of their names.",
    )


class CheckpointConfig(_Section):
    """When a checkpoint is written."""

    interval: CountOrNone = Field(default=100, description="Steps between checkpoints; 0: after the last step only.")
    keep: Count = Field(default=2, description="Checkpoints that stay; older ones are deleted.")


class RunConfig(_Section):
    """A complete run. Every section but `model` has defaults."""

    model: ModelConfig = Field(description="Shape of the model; names as in a DeepSeek-V3 config.json.")
    balance: BalanceConfig = Field(
       default= default_factory=BalanceConfig, description="How experts are kept equally busy."
    )
    mtp: MtpConfig = Field(
       default= default_factory=MtpConfig,
        description="Multi-token prediction; the number of modules is model.num_nextn_predict_layers.",
    )
    training: TrainingConfig = Field(
       default= default_factory=TrainingConfig, description="What the optimizer does, and how the work is cut up."
    )
    data: DataConfig = Field(default_factory=DataConfig, description="Where the documents come from.")
    checkpoint: CheckpointConfig = Field(
       default= default_factory=CheckpointConfig, description="When a checkpoint is written."
    )
    cluster: ClusterConfig = Field(
       default= default_factory=ClusterConfig, description="Where the experts live, and how tokens reach them."
    )

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        problems = list(_conflicts(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Check plain values, as read from YAML.

        Raises:
            ConfigError: with one line a problem, each naming the full path of its field.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise explain(error, cls, values) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` takes back."""
        return self.model_dump(mode="json")

    @property
    def microbatches(self) -> int:
        """Microbatches of a step, over all workers."""
        return self.training.batch_size // self.training.microbatch_size


def _conflicts(config: RunConfig) -> list[str]:
    """What is fine field by field but not together; each line starts with the path of the field to change."""
    model, training, cluster = config.model, config.training, config.cluster
    problems = []
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
    return problems


__all__ = [
    "CheckpointConfig",
    "DTypeName",
    "DataConfig",
    "MtpConfig",
    "RunConfig",
    "TrainingConfig",
]
