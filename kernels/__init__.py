"""Compiled arithmetic, for where starting a tensor operation costs more than what it does."""
