"""Commands that are neither training nor serving."""

from __future__ import annotations
