"""The configuration of a served model: one YAML file, validated completely before anything starts."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, ValidationError, field_validator, model_validator

from cluster.config import ClusterConfig, GpuShare, Reserved, Seconds
from engine.settings import EngineSettings
from errors import ConfigError
from jobs.api.api_keys import FILE_VARIABLE, VARIABLE, ApiKeys, configured_digests, is_digest, taken_from
from jobs.api.backend import Limits
from jobs.checkpoints.generation_defaults import GenerationSource
from jobs.config.config_file import apply_override
from jobs.config.field_errors import Section
from jobs.config.run_config import CountOrZero, DTypeName, Size, Threads
from jobs.config.yaml_text import read_yaml
from jobs.console import say
from jobs.serving.front_config import FrontConfig


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
        api_keys: API keys, one of which every request must carry, each as it is or as `sha256:` and its
            digest; without these, a file and the environment's, no key is needed.
        api_keys_file: a file on the head node with an API key on each line, or a directory of such files, as
            Kubernetes mounts a secret; it is followed, so that keys change without a restart.
        replicas: number of trunk replicas, which share the expert hosts.
        api_replicas: number of processes of the interface, which have no weights.
        resume_timeout: seconds that a request waits for another replica after its own has died.
        autoscaling: Ray Serve's autoscaling_config for the replicas, in place of `replicas`.
        cpus_per_replica: CPUs that Ray reserves for each replica.
        gpus_per_replica: GPUs that Ray reserves for each replica, which then computes on one; a fraction
            shares a GPU with others, 0 computes on CPUs.
        threads: compute threads of a replica; null takes as many as reserved CPUs, at least one.
        front: limits of connections, headers and bodies.
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
    api_keys_file: str | None = None
    replicas: Size = 1
    api_replicas: Size = 1
    resume_timeout: Seconds = 120.0
    autoscaling: dict[str, Any] | None = None
    cpus_per_replica: Reserved = 1.0
    gpus_per_replica: GpuShare = 0
    threads: Threads | None = None
    front: FrontConfig = FrontConfig()

    model_config = ConfigDict(hide_input_in_errors=True)

    @field_validator("api_keys", mode="before")
    @classmethod
    def _digests_in_place_of_keys(cls, value: Any) -> Any:
        return configured_digests(value, lambda text: say(f"serving.api_keys: {text}"))

    @field_validator("api_keys_file")
    @classmethod
    def _whatever_the_working_directory(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.strip():
            raise ValueError("this is empty; give a path, or null")
        return str(Path(value).expanduser().absolute())

    @field_validator("autoscaling")
    @classmethod
    def _as_serve_takes_it(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        from ray.serve.config import AutoscalingConfig  # slow to import, and rarely used

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

    def allowed_keys(self, tell: Callable[[str], None] = say) -> ApiKeys:
        """The API keys of requests, with those of this process's environment.

        Args:
            tell: Is given a line about a change or a fault of their file.

        Raises:
            ConfigError: The file of keys cannot be read, or a variable is set and empty.
        """
        file = None if self.api_keys_file is None else Path(self.api_keys_file)
        return ApiKeys.of(self.api_keys, file, tell=tell)

    def limits(self) -> Limits:
        """The limits that the interface enforces."""
        return Limits(
            max_queue=self.max_queue,
            max_prompt=self.max_prompt,
            max_tokens=self.max_tokens,
            body_memory=self.front.body_memory,
            body_rate=self.front.body_rate,
        )


class ServeConfig(Section):
    """The configuration of a served model.

    Attributes:
        serving: the trunk replicas and their limits.
        cluster: the expert hosts, and the channels to them.
    """

    serving: ServingConfig = ServingConfig()
    cluster: ClusterConfig = ClusterConfig()

    model_config = ConfigDict(hide_input_in_errors=True)

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
        given: dict[str, Any] = {}
        for override in overrides:
            apply_override(given, override)
            apply_override(values, override)
        if _has_keys(given):
            raise ConfigError(
                "--set serving.api_keys: other users see the arguments of a command, and Ray records them; "
                f"put the keys into {VARIABLE}, or into a file that serving.api_keys_file or "
                f"{FILE_VARIABLE} names, or give their digests (sha256:…)"
            )
        return cls.from_dict(values)

    @classmethod
    def of_arguments(cls, values: Any) -> Self:
        """The configuration in the `args` of a Serve config file.

        Raises:
            ConfigError: A value is invalid, or an API key stands there.
        """
        if _has_keys(values):
            raise ConfigError(
                "args.serving.api_keys: Ray Serve's status and dashboard show these arguments; give "
                "serving.api_keys_file, or the digests of the keys (sha256:…)"
            )
        return cls.from_dict(values)

    def with_keys_of(self, environment: MutableMapping[str, str]) -> Self:
        """This configuration with the keys of a command's environment, which loses them.

        Raises:
            ConfigError: A variable is set and empty, or holds what is no key.
        """
        keys, file = taken_from(environment)
        changes = {
            "api_keys": (*self.serving.api_keys, *keys),
            "api_keys_file": self.serving.api_keys_file or (None if file is None else str(file)),
        }
        return self.model_copy(update={"serving": self.serving.model_copy(update=changes)})


def _has_keys(values: Any) -> bool:
    """Whether the plain values of a configuration hold an API key as it is, and not its digest."""
    serving = values.get("serving") if isinstance(values, dict) else None
    keys = serving.get("api_keys") if isinstance(serving, dict) else None
    return keys is not None and not (isinstance(keys, list | tuple) and all(map(is_digest, keys)))


__all__ = ["ServeConfig", "ServingConfig"]
