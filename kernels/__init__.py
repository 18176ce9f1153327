"""Compiled arithmetic, where the start of a tensor operation would take longer than the arithmetic."""
