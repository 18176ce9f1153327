"""Entry points and composition: the command line, the configuration, data, training, conversion.

Everything above the actors lives here; nothing below may import it.
"""

from __future__ import annotations

__all__: list[str] = []
