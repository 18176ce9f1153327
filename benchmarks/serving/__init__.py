"""`raymoe bench serve`: a server under load that does not wait for it."""

from __future__ import annotations
