"""The channel within a machine, and the shared memory that it is made of."""

from __future__ import annotations
