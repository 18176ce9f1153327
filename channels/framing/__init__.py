"""What channels over a byte stream share: headers, frames, requests in flight."""

from __future__ import annotations
