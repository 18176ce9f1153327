"""Loads a `RunConfig` from `--preset`, `--config` and `--set`, and writes it to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import ConfigError
from jobs.config.presets import DEFAULT_PRESET, preset
from jobs.config.run_config import RunConfig
from jobs.config.yaml_text import commented_yaml, parse_yaml, read_yaml


def load_config(
    *, path: Path | None = None, preset_name: str | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """Load a configuration.

    Args:
        path: A YAML file; fields that it leaves out have their defaults (`model` has none).
        preset_name: Name of a preset, instead of a file; with neither, `demo`.
        overrides: `section.field=value`, with values in YAML, applied in their order.

    Raises:
        ConfigError: One line for each problem, with the full path of its field.
    """
    if path is not None and preset_name is not None:
        raise ConfigError(
            "--config and --preset were both given; give one of them, and --set for what differs"
        )
    if path is not None:
        values = read_yaml(path)
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path}: holds no mapping of sections (model, training, …); see `raymoe config`"
            )
    else:
        values = preset(preset_name or DEFAULT_PRESET).to_dict()
    for override in overrides:
        apply_override(values, override)
    return RunConfig.from_dict(values)


def write_config(config: RunConfig, path: Path) -> None:
    """Write a configuration with comments; `load_config(path=…)` returns the same one."""
    path.write_text(commented_yaml(config), encoding="utf-8")


def apply_override(values: dict[str, Any], override: str) -> None:
    """Apply one `a.b=v` to plain values, in place."""
    path, separator, text = override.partition("=")
    path = path.strip()
    if not separator or not path or not all(path.split(".")):
        raise ConfigError(f"--set {override!r}: write section.field=value, such as cluster.expert_hosts=2")
    if not text.strip():
        raise ConfigError(f"--set {path}: is empty; write {path}=VALUE")
    value = parse_yaml(text, f"--set {path}")
    *sections, name = path.split(".")
    here = values
    for i, section in enumerate(sections):
        inner = here.get(section)
        if inner is None:
            inner = here[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"--set {path}: {'.'.join(sections[: i + 1])} is a value, not a section with fields"
            )
        here = inner
    here[name] = value


__all__ = ["apply_override", "load_config", "write_config"]
