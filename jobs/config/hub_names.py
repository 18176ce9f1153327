"""Recognises names of models on the Hugging Face Hub where a path is expected."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_hint(path: Path) -> str:
    """What to do with a path that does not exist but may be a model's name on the Hub; empty for other paths.

    A path within a folder that exists is taken as a path.
    """
    name = str(path)
    if path.exists() or path.parent.exists() or not _NAME.fullmatch(name):
        return ""
    return (
        f"; if it is a model of the Hugging Face Hub, download it (hf download {name} --local-dir DIR) "
        "and give DIR"
    )


__all__ = ["hub_hint"]
