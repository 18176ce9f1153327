"""Constants of the arithmetic that compiled functions and tensor operations share."""

from __future__ import annotations

from typing import Final

FEW_ROWS: Final = 16
"""Up to this number of rows, one sweep over the weights beats matrix products of many rows."""

LATENT_NORM_EPS: Final = 1e-6
"""Epsilon of the norms of MLA's compressed queries and keys in every release, whatever `rms_norm_eps` is."""

MIN_GATE_SUM: Final = 1e-20
"""Added to sums that affinities are divided by, as released code does: all-zero affinities stay finite."""

__all__ = ["FEW_ROWS", "LATENT_NORM_EPS", "MIN_GATE_SUM"]
