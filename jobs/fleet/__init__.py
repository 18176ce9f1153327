"""The Ray session of a job, and the actors in it."""

from __future__ import annotations
