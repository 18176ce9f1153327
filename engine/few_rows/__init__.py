"""The trunk's forward pass over few positions, on compiled functions of `kernels`."""

from __future__ import annotations

from engine.few_rows.batch import FewRowsBatch
from engine.few_rows.runner import FewRowsRunner

__all__ = ["FewRowsBatch", "FewRowsRunner"]
