"""Defaults of sampling parameters from a model's generation_config.json, as vLLM takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.params import SamplingParams
from errors import ConfigError, DataError, brief
from jobs.data.carried_files import GENERATION_FILE, read_object

GenerationSource = Literal["auto", "none"]
"""Where defaults come from: `auto` is the model's generation_config.json, `none` leaves that out."""

_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Values of sampling parameters that a request does not set.

    Attributes:
        values: Values by the parameters' names in `SamplingParams`.
        max_tokens: Number of tokens to generate; None names no number.
        samples: `do_sample`; None if the file does not say.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    samples: bool | None = None

    @classmethod
    def of(cls, directory: Path, source: GenerationSource = "auto") -> GenerationDefaults:
        """The defaults of the model in a directory.

        Raises:
            DataError: generation_config.json is damaged, or has a value that cannot be.
        """
        if source == "none":
            return cls()
        file = directory / GENERATION_FILE
        given = {name: value for name, value in read_object(file).items() if value is not None}
        values = {name: given[name] for name in _NAMES if name in given}
        longest, samples = given.get("max_new_tokens"), given.get("do_sample")
        for name, value in {**values, **({} if longest is None else {"max_new_tokens": longest})}.items():
            whole = name in ("top_k", "max_new_tokens")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise _refused(file, f"{name} is {brief(value)}, not a {'whole ' if whole else ''}number")
        if "top_k" in values:
            values["top_k"] = max(0, values["top_k"])  # -1 also takes all tokens
        if longest is not None and longest < 1:
            raise _refused(file, f"max_new_tokens ({brief(longest)}) is less than 1")
        try:
            SamplingParams(**values)
        except ConfigError as error:
            raise _refused(file, str(error)) from None
        return cls(values=values, max_tokens=longest, samples=samples if isinstance(samples, bool) else None)

    @property
    def temperature(self) -> float:
        """The temperature of a command that is greedy where the file does not ask for sampling."""
        if self.samples is False:
            return 0.0
        return float(self.values.get("temperature", 1.0 if self.samples else 0.0))

    def __str__(self) -> str:
        """The defaults as a list; empty without any."""
        named = {**self.values, **({} if self.max_tokens is None else {"max_new_tokens": self.max_tokens})}
        return ", ".join(f"{name} {value:g}" for name, value in named.items())


def _refused(file: Path, reason: str) -> DataError:
    return DataError(f"{file}: {reason}; correct it, or leave the file out with --generation-config none")


__all__ = ["GenerationDefaults", "GenerationSource"]
