"""`raymoe bench serve`: measures a server under open-loop load."""

from __future__ import annotations
