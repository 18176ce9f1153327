"""The expert hosts of a deployment, and the version of the weights that it serves."""

from __future__ import annotations
