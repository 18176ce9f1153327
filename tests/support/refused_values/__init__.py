"""Values of the chart that are refused, and what is next to them and works."""

from __future__ import annotations

__all__: list[str] = []
