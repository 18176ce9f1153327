"""The configuration of a run: fields, presets, files, and what is said about wrong ones."""

from __future__ import annotations
