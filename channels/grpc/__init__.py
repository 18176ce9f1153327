"""The channel between machines, and how gRPC servers of a job are guarded."""

from __future__ import annotations
