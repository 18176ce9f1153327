"""The losses of training and evaluation."""

from __future__ import annotations
