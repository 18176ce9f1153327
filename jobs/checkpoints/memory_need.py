"""Estimates the memory that a model needs from its configuration, before anything is loaded or started.

It is a lower bound, weights and cache only, so that no model is refused that would fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from engine.weights import TrunkWeights
from errors import ResourceError
from model.checkpoints.meta_device import meta_device
from model.config import ModelConfig
from model.transformer import Transformer

_GIB = 1 << 30
_UNLIMITED = 1 << 60  # cgroups of version 1 state "no limit" as a number above this


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Bytes that serving a model takes on one machine.

    Attributes:
        trunk, cache: Bytes of the trunk's weights and of the KV cache, per replica.
        experts: Bytes of all experts together.
        replicas: Number of trunk replicas.
        hosts: Number of expert hosts; with 0 every replica holds all experts.
    """

    trunk: int
    cache: int
    experts: int
    replicas: int = 1
    hosts: int = 0

    @property
    def total(self) -> int:
        """Bytes of all processes together."""
        return self.replicas * (self.trunk + self.cache) + (1 if self.hosts else self.replicas) * self.experts


def serving_need(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    cache_tokens: int,
    replicas: int = 1,
    hosts: int = 0,
    modules: bool = True,
) -> MemoryNeed:
    """The memory that a served model takes once it is loaded.

    Args:
        dtype: The type of weights and cache.
        cache_tokens: Positions of each replica's cache.
        replicas: Number of trunk replicas.
        hosts: Number of expert hosts.
        modules: Whether the MTP modules are loaded, to draft.
    """
    with meta_device():
        model = Transformer(config, dtype=dtype)
        model.tie()
        weights = TrunkWeights.of(model, modules=modules)
    # Views share a storage, and a tied head is the embedding itself.
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in _tensors(weights)}
    row = config.kv_lora_rank + config.qk_rope_head_dim
    n_layers = len(weights.layers) + len(weights.modules)
    return MemoryNeed(
        trunk=sum(storage.nbytes() for storage in storages.values()),
        cache=cache_tokens * row * n_layers * dtype.itemsize,
        experts=_experts(config, dtype),
        replicas=replicas,
        hosts=hosts,
    )


def loading_need(config: ModelConfig, dtype: torch.dtype) -> MemoryNeed:
    """The memory that a model takes in one process, with its experts and without a cache."""
    experts = _experts(config, dtype)
    return MemoryNeed(trunk=config.total_parameters() * dtype.itemsize - experts, cache=0, experts=experts)


def check_memory(need: MemoryNeed, *, advice: str, free: int | None = None) -> None:
    """Check that there is enough free memory.

    Args:
        advice: What the user can do if there is not.
        free: Bytes of free memory; None determines them.

    Raises:
        ResourceError: There is not; the message says how much is needed for which part, and the advice.
    """
    free = free_memory() if free is None else free
    if need.total <= free:
        return
    parts = f"a trunk of {_gib(need.trunk)}"
    if need.cache:
        parts += f" and a cache of {_gib(need.cache)}"
    if need.replicas > 1:
        parts = f"{need.replicas} replicas, each with {parts}"
    where = f" on {need.hosts} host{'' if need.hosts == 1 else 's'}" if need.hosts else ""
    if need.replicas > 1 and not need.hosts:
        where = " in each"
    raise ResourceError(
        f"the model needs {_gib(need.total)} of memory at least, and this machine has {_gib(free)} free: "
        f"{parts}, experts of {_gib(need.experts)}{where}; {advice}"
    )


def free_memory(
    *, machine: int | None = None, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes that this process and its children can still allocate.

    That is the machine's free memory with swap, or what the limit of a container leaves if that is less;
    memory of the page cache counts as free.

    Args:
        machine: Free bytes of the machine; None determines them.
        proc, cgroups: Mount points of these file systems.
    """
    swap = psutil.swap_memory().free if machine is None else 0
    if machine is None:
        machine = psutil.virtual_memory().available + swap
    return max(0, min([machine, *(room + swap for room in _cgroup_rooms(proc, cgroups))]))


def _cgroup_rooms(proc: Path, cgroups: Path) -> Iterator[int]:
    """Free bytes under the limit of this process's cgroup and of each one around it."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = root / path.lstrip("/")
        # In a container its own group is the root, although the path may be the one outside the container.
        for level in [group, *group.parents] if group.is_dir() else [root]:
            limit, used = (_number(level / name) for name in names)
            if limit is not None and used is not None and limit < _UNLIMITED:
                yield limit - used + _page_cache(level / "memory.stat")
            if level == root:
                break


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or `max`
        return None


def _page_cache(file: Path) -> int:
    """Bytes of the page cache, which the kernel frees when memory is needed."""
    try:
        counts = dict(line.split() for line in file.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return 0
    # Version 1 counts groups within this one under names with the prefix total_.
    return sum(
        int(counts.get(f"total_{name}", counts.get(name, 0))) for name in ("active_file", "inactive_file")
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors within nested dataclasses and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _experts(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of all routed experts."""
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    return len(config.moe_layers) * config.n_routed_experts * expert * dtype.itemsize


def _gib(amount: int) -> str:
    return f"{amount / _GIB:,.1f} GiB" if amount >= _GIB / 10 else f"{amount / (1 << 20):,.1f} MiB"


__all__ = ["MemoryNeed", "check_memory", "free_memory", "loading_need", "serving_need"]
