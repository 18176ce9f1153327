"""A replica of the trunk, which generates."""

from __future__ import annotations
