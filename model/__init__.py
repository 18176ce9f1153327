"""The model: pure torch, no Ray, no sockets. The trunk is given its experts from outside."""

from __future__ import annotations

from model.config import BalanceConfig, ModelConfig

__all__ = ["BalanceConfig", "ModelConfig"]
