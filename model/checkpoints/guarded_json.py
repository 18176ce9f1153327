"""Parses JSON that others have written: one object of bounded depth, number of values and numbers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

DEEPEST = 64
"""Levels of lists and objects, the outermost one included; files of published checkpoints have up to 8."""

_BOM = b"\xef\xbb\xbf"
_LARGEST = 10**40  # beyond 10**30, which transformers writes for "no limit"
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_HALF = re.compile("[\ud800-\udfff]")


def parse_object(data: bytes, *, values: int, finite: bool = True) -> dict[str, Any]:
    """The object in the bytes of a JSON file; of a key that is given twice the last value, as transformers.

    Args:
        data: The file's contents.
        values: Values that they may have. A comma or bracket within a string is counted, too.
        finite: Refuse NaN and Infinity, which are no JSON but which Python reads and writes.

    Raises:
        ValueError: They are something else, or beyond a limit; the text says why.
    """
    if data.startswith(_BOM):
        raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
    # An empty list has 2 bytes in the file and 64 in memory, so the number of values is limited, too.
    if sum(map(data.count, (b"[", b"{", b","))) > values:
        raise ValueError(f"it has more than {values:,} values")
    try:
        parsed = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError(_too_deep()) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno} is not JSON: {error.msg}") from None
    except ValueError:  # of int(), by sys.set_int_max_str_digits
        raise ValueError("a number has thousands of digits") from None
    if not isinstance(parsed, dict):
        raise ValueError("it holds no JSON object")
    _check(parsed, finite=finite, halves=_ESCAPED_HALF.search(data) is not None)
    return parsed


def _check(parsed: dict[str, Any], *, finite: bool, halves: bool) -> None:
    """Check depth, whole numbers, all numbers if `finite`, and all texts if `halves`."""
    level: list[Any] = [parsed]
    for _ in range(DEEPEST):
        inner = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
        for item in inner:
            if finite and isinstance(item, float) and not math.isfinite(item):
                raise ValueError("it has the number NaN or Infinity, which JSON lacks")
            if type(item) is int and not -_LARGEST < item < _LARGEST:
                raise ValueError("a number has more than 40 digits")
        if halves and any(map(_HALF.search, _texts(level, inner))):
            raise ValueError("a text has half of a surrogate pair, which is no character")
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(_too_deep())


def _texts(level: list[Any], inner: list[Any]) -> Iterator[str]:
    for one in level:
        if isinstance(one, dict):
            yield from one
    yield from (item for item in inner if isinstance(item, str))


def _too_deep() -> str:
    return f"lists or objects are nested more than {DEEPEST} deep"


__all__ = ["DEEPEST", "parse_object"]
