"""The pool of a deployment: its expert hosts, and the version of its weights."""

from __future__ import annotations
