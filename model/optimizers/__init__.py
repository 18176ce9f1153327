"""AdamW over flat buffers and over shards, and schedules of its learning rate."""

from __future__ import annotations
