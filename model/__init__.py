"""The model in pure torch, without Ray or sockets; the trunk is given its experts from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.config import BalanceConfig, ModelConfig

if TYPE_CHECKING:
    from model.checkpoints.pretrained import load_pretrained, save_pretrained


def __getattr__(name: str) -> Any:
    """Import checkpoints on first use, so that reading a configuration does not import torch."""
    if name in ("load_pretrained", "save_pretrained"):
        from model.checkpoints import pretrained as checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["BalanceConfig", "ModelConfig", "load_pretrained", "save_pretrained"]
