"""The Ray session of a job, and its actors."""

from __future__ import annotations
