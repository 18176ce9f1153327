"""The configuration of a run: fields, presets, files, and errors."""

from __future__ import annotations
