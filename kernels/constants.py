"""Constants of the arithmetic that compiled functions and tensor operations share."""

from __future__ import annotations

from typing import Final

LATENT_NORM_EPS: Final = 1e-6
"""Epsilon of the norms of MLA's compressed queries and keys in every release, whatever `rms_norm_eps` is."""

MIN_GATE_SUM: Final = 1e-20
"""Added to sums that affinities are divided by, as released code does: all-zero affinities stay finite."""

__all__ = ["LATENT_NORM_EPS", "MIN_GATE_SUM"]
