"""Framing that the channels share: headers, frames, tensors as bytes, requests in flight, servers."""

from __future__ import annotations
