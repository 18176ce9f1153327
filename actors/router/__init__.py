"""The router: routing tables, and the calls to expert hosts of one MoE layer."""

from __future__ import annotations
