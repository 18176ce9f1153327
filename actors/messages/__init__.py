"""Values that actors exchange, and their forms on the wire; they know no actor."""

from __future__ import annotations
