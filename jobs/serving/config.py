"""The configuration of a served model: one YAML file, validated completely before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, field_validator, model_validator

from cluster.config import ClusterConfig, GpuShare, Reserved, Seconds
from engine.settings import EngineSettings
from errors import ConfigError
from jobs.api.backend import Limits
from jobs.checkpoints.generation_defaults import GenerationSource
from jobs.config.config_file import apply_override
from jobs.config.field_errors import Section
from jobs.config.run_config import CountOrZero, DTypeName, Size, Threads
from jobs.config.yaml_text import read_yaml


class ServingConfig(Section):
    """The trunk replicas and their limits.

    Attributes:
        name: name of the model for clients; null takes the name of the directory, or of the run.
        dtype: dtype of trunk and experts; `auto` keeps that of the weights if the device computes in it.
        cache_tokens: positions that a replica's KV cache holds, over all requests.
        page_size: positions of a page of the cache.
        max_batch_tokens: positions that a replica computes in a step.
        max_sequences: requests that a replica runs at the same time.
        prefix_caching: whether prompts with the same beginning share pages of the cache.
        drafts: number of MTP modules to draft with; null takes all of the model's, 0 none.
        pace_drafts: draft only while it saves time; false drafts always.
        overlap_from: positions of a step from which a replica computes it in two halves, so that one half
            computes while the other's experts are away; null never does.
        generation_config: `auto` takes sampling parameters that a request does not set from the model's
            generation_config.json, `none` takes raymoe's defaults; its end tokens hold either way.
        max_queue: requests that may wait at a replica; further ones get status 429.
        max_prompt: largest number of tokens of a prompt; null is the model's limit.
        max_tokens: largest number of tokens that a request may ask for; null is the model's limit.
        api_keys: API keys, one of which every request must carry; if empty, no key is needed.
        replicas: number of trunk replicas, which share the expert hosts.
        api_replicas: number of processes of the interface, which have no weights.
        resume_timeout: seconds that a request waits for another replica after its own has died.
        autoscaling: Ray Serve's autoscaling_config for the replicas, in place of `replicas`.
        cpus_per_replica: CPUs that Ray reserves for each replica.
        gpus_per_replica: GPUs that Ray reserves for each replica, which then computes on one; a fraction
            shares a GPU with others, 0 computes on CPUs.
        threads: compute threads of a replica; null takes as many as reserved CPUs, at least one.
    """

    name: str | None = None
    dtype: DTypeName = "auto"
    cache_tokens: Size = 32768
    page_size: Size = 16
    max_batch_tokens: Size = 512
    max_sequences: Size = 64
    prefix_caching: bool = True
    drafts: CountOrZero | None = None
    pace_drafts: bool = True
    overlap_from: Size | None = None
    generation_config: GenerationSource = "auto"
    max_queue: CountOrZero = 256
    max_prompt: Size | None = None
    max_tokens: Size | None = None
    api_keys: tuple[str, ...] = ()
    replicas: Size = 1
    api_replicas: Size = 1
    resume_timeout: Seconds = 120.0
    autoscaling: dict[str, Any] | None = None
    cpus_per_replica: Reserved = 1.0
    gpus_per_replica: GpuShare = 0
    threads: Threads | None = None

    @field_validator("autoscaling")
    @classmethod
    def _as_serve_takes_it(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        from ray.serve.config import AutoscalingConfig  # slow to import, and rarely used

        if value is None:
            return None
        unknown = sorted(set(value) - set(AutoscalingConfig.model_fields))
        if unknown:  # Serve ignores them
            raise ValueError(f"Ray Serve's autoscaling_config has no field {', '.join(unknown)}; remove it")
        try:
            AutoscalingConfig(**value)
        except ValidationError as error:
            wrong = error.errors()[0]
            field = ".".join(map(str, wrong["loc"]))
            text = wrong["msg"].removeprefix("Value error, ")
            raise ValueError(f"{field}: {text}" if field else text) from None
        return value

    @model_validator(mode="after")
    def _a_page_fits(self) -> Self:
        if self.page_size > self.cache_tokens:
            raise ValueError(
                f"page_size ({self.page_size}) is more than serving.cache_tokens "
                f"({self.cache_tokens}): the cache would hold no page; lower the one or raise the other"
            )
        return self

    def engine_settings(self) -> EngineSettings:
        """The settings of each replica's engine."""
        return EngineSettings(
            cache_tokens=self.cache_tokens,
            page_size=self.page_size,
            max_batch_tokens=self.max_batch_tokens,
            max_sequences=self.max_sequences,
            prefix_caching=self.prefix_caching,
            drafts=self.drafts,
            pace_drafts=self.pace_drafts,
            overlap_from=self.overlap_from,
        )

    def limits(self) -> Limits:
        """The limits that the interface enforces."""
        return Limits(
            max_queue=self.max_queue,
            max_prompt=self.max_prompt,
            max_tokens=self.max_tokens,
            api_keys=self.api_keys,
        )


class ServeConfig(Section):
    """The configuration of a served model.

    Attributes:
        serving: the trunk replicas and their limits.
        cluster: the expert hosts, and the channels to them.
    """

    serving: ServingConfig = ServingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def on_gpus(self) -> bool:
        """Whether all replicas and hosts compute on GPUs."""
        hosts = self.cluster.gpus_per_host > 0 or not self.cluster.expert_hosts
        return self.serving.gpus_per_replica > 0 and hosts

    @classmethod
    def load(cls, file: Path | None, overrides: list[str]) -> Self:
        """Read a YAML file and apply overrides of single fields (`a.b=v`).

        Raises:
            ConfigError: The file is missing or malformed, or a value is invalid.
        """
        values: Any = {} if file is None else read_yaml(file) or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: holds no mapping of sections (serving, cluster)")
        for override in overrides:
            apply_override(values, override)
        return cls.from_dict(values)


__all__ = ["ServeConfig", "ServingConfig"]
