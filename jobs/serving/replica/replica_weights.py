"""Loads the weights of a trunk replica from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.weights import TrunkWeights
from jobs.checkpoints.memory_need import serving_need
from jobs.config.device_and_dtype import compute_device
from jobs.serving.config import ServeConfig
from jobs.serving.served_model import require_room, serving_dtype
from model.checkpoints.meta_device import meta_device
from model.checkpoints.pretrained import PretrainedSource, load_pretrained
from model.experts.local import LocalExperts
from model.transformer import Transformer


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaWeights:
    """The weights of a replica.

    Attributes:
        trunk: Weights of the trunk.
        experts: Weights of the experts; None if they are on hosts.
    """

    trunk: TrunkWeights
    experts: LocalExperts | None


def load_weights(config: ServeConfig, directory: Path, *, experts: bool) -> ReplicaWeights:
    """Load the trunk of a checkpoint, and with `experts` all experts into this process.

    Raises:
        CheckpointError: The weights are incomplete or of another architecture.
    """
    dtype, modules = serving_dtype(config, directory), config.serving.drafts != 0
    device = compute_device(config.serving.gpus_per_replica, "serving.gpus_per_replica")
    if experts:
        whole = load_pretrained(directory, dtype=dtype).to(device)
        trunk = TrunkWeights.of(whole.trunk, modules=modules)
        return ReplicaWeights(trunk=trunk, experts=whole.experts)
    source = PretrainedSource(directory, dtype=dtype)
    with meta_device():
        model = Transformer(source.config, dtype=dtype)
    model = model.to_empty(device=device)
    model.tie()
    model.load_state_dict(source.trunk())
    return ReplicaWeights(trunk=TrunkWeights.of(model, modules=modules), experts=None)


def load_beside(config: ServeConfig, directory: Path, *, experts: bool) -> ReplicaWeights:
    """Load weights beside those in use.

    Raises:
        ResourceError: There is not enough memory for both.
    """
    dtype, modules = serving_dtype(config, directory), config.serving.drafts != 0
    need = serving_need(PretrainedSource(directory).config, dtype, cache_tokens=0, modules=modules)
    require_room(need.trunk + (need.experts if experts else 0), "a replica")
    return load_weights(config, directory, experts=experts)


__all__ = ["ReplicaWeights", "load_beside", "load_weights"]
