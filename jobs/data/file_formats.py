"""Reads the records of one file: plain text, Python source, JSON, JSON lines or Parquet.

Suffixes are read in any case. `.gz` and `.zst` behind another suffix are decompressed.
"""

from __future__ import annotations

import gzip
import io
import json
import tokenize
import zlib
from collections.abc import Iterator
from typing import Any

_JSON_LINES, _JSON, _PARQUET, _SOURCE = (".jsonl", ".ndjson"), (".json",), (".parquet",), (".py",)
_COMPRESSED = (".gz", ".zst")
_BOM = "\ufeff"
_SHOWN = 12  # names of fields in a message
_DAMAGE = (EOFError, zlib.error, OSError)  # Arrow and gzip raise OSErrors without a number

Record = tuple[str, str | None, str]
"""A record's place in its file (such as `line 7`), its text, and why it has none."""


class UnreadableFile(Exception):
    """The rest of a file cannot be read; the text says why, and what to do."""


def is_plain_text(name: str) -> bool:
    """Whether a file of this name is read as one text."""
    return not _format(name).endswith(_JSON_LINES + _JSON + _PARQUET)


def is_streamed(name: str) -> bool:
    """Whether the first records of a file of this name can be read without the rest of it."""
    return _format(name).endswith(_JSON_LINES + _PARQUET)


def records(path: str, name: str, text_field: str) -> Iterator[Record]:
    """The records of a file in their order; a plain text is one record, whose place is empty.

    Args:
        path: Path of the file.
        name: Its name, which says its format.
        text_field: Field or column with the text of a record.

    Raises:
        UnreadableFile: The file does not have the format of its name, is damaged, or cannot be opened.
    """
    kind = _format(name)
    try:
        if kind.endswith(_PARQUET):
            yield from _parquet(path, text_field)
        elif kind.endswith(_JSON_LINES):
            yield from _json_lines(path, text_field)
        elif kind.endswith(_JSON):
            yield from _json(path, text_field)
        else:
            yield "", _text(path, source=kind.endswith(_SOURCE) and kind == name.lower()), ""
    except UnicodeDecodeError as error:
        raise UnreadableFile(_not_utf8(error)) from None
    except _DAMAGE as error:
        raise UnreadableFile(_damage(error)) from None


def _format(name: str) -> str:
    """A name in lower case, without the suffix of a compression."""
    lower = name.lower()
    for suffix in _COMPRESSED:
        lower = lower.removesuffix(suffix)
    return lower


def _opened(path: str) -> io.BufferedIOBase:
    lower = path.lower()
    if lower.endswith(".gz"):
        return gzip.GzipFile(path)
    if lower.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return open(path, "rb")


def _text(path: str, *, source: bool) -> str:
    if not source:
        with _opened(path) as file:
            return file.read().decode("utf-8-sig")
    try:  # Python source declares its own encoding, which need not be one of text
        with tokenize.open(path) as lines:
            text = lines.read()
    except UnicodeDecodeError:
        raise
    except (SyntaxError, LookupError, UnicodeError) as error:
        raise UnreadableFile(f"is not Python source ({error}); leave it out, or change its suffix") from None
    half = _half_character(text)
    if half:
        raise UnreadableFile(half)
    return text


def _json_lines(path: str, text_field: str) -> Iterator[Record]:
    number = 0
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield (f"line {number}", *_parsed(line, text_field))
    except _DAMAGE as error:
        raise UnreadableFile(_damage(error, f" after line {number}" if number else "")) from None


def _json(path: str, text_field: str) -> Iterator[Record]:
    """The records of a list, of one object, or of lines that are an object each."""
    with _opened(path) as file:
        whole = file.read()
    try:
        value = json.loads(whole.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        first = whole.lstrip().partition(b"\n")[0]
        if error.msg.startswith("Extra data") and _parsed(first, text_field)[0] is not None:
            yield from _json_lines(path, text_field)
            return
        raise UnreadableFile(
            f"is not JSON (line {error.lineno}: {error.msg}); it has to be a list of objects, one object, or "
            "an object in each line"
        ) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise UnreadableFile(f"is JSON that cannot be read ({_reason(error)}); repair it") from None
    items = value if isinstance(value, list) else [value]
    for number, item in enumerate(items, start=1):
        yield (f"record {number}", *_field(item, text_field))


def _parquet(path: str, text_field: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    if path.lower().endswith(_COMPRESSED):
        raise UnreadableFile("is a compressed Parquet file; decompress it, Parquet compresses by itself")
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = table.schema_arrow.names
        if text_field not in columns:
            raise UnreadableFile(f"has no column {text_field!r}; set data.text_field to {_one_of(columns)}")
        for batch in table.iter_batches(columns=[text_field], batch_size=1024):
            for value in batch.column(0):
                number += 1
                try:
                    yield (f"row {number}", *_field({text_field: value.as_py()}, text_field))
                except UnicodeDecodeError as error:
                    yield f"row {number}", None, _not_utf8(error)
    except (pyarrow.ArrowException, OSError) as error:
        if number or isinstance(error, OSError):
            raise UnreadableFile(_damage(error, f" after row {number}" if number else "")) from None
        raise UnreadableFile(f"is not a Parquet file ({_line(error)})") from None


def _parsed(line: bytes, text_field: str) -> tuple[str | None, str]:
    """The text in a line of JSON, and why it has none."""
    try:
        return _field(json.loads(line.decode("utf-8").lstrip(_BOM)), text_field)
    except UnicodeDecodeError as error:
        return None, _not_utf8(error)
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg}; every line must be one JSON object"
    except (ValueError, RecursionError) as error:
        return None, f"JSON that cannot be read ({_reason(error)}); repair or remove it"


def _field(value: Any, text_field: str) -> tuple[str | None, str]:
    """The text in a record, and why it has none."""
    if not isinstance(value, dict):
        return None, f"is a {type(value).__name__}, not an object with the field {text_field!r}"
    text = value.get(text_field)
    if not isinstance(text, str):
        if text_field in value:
            kind = "null" if text is None else f"a {type(text).__name__}"
            return None, f"has no text in the field {text_field!r}, which is {kind}; set data.text_field"
        there = [name for name, inner in value.items() if isinstance(inner, str)] or list(value)
        fix = f"set data.text_field to {_one_of(there)}" if there else "it has no fields"
        return None, f"has no text in the field {text_field!r}; {fix}"
    half = _half_character(text)
    return (None, half) if half else (text, "")


def _half_character(text: str) -> str:
    """Why a text is none: it has half of a surrogate pair; empty if it has not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        return f"holds half of a surrogate pair ({half} at character {error.start}); repair or remove it"
    return ""


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply"
    if "integer string conversion" in str(error):
        return "a number of more than 4,300 digits"
    return _line(error)


def _damage(error: Exception, after: str = "") -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read{after}: {error.strerror}"
    return f"is cut short or damaged{after} ({_line(error)}); copy it again"


def _not_utf8(error: UnicodeDecodeError) -> str:
    begins = bytes(error.object[:2]) if isinstance(error.object, bytes | bytearray) else b""
    encoding = "UTF-16" if begins in (b"\xff\xfe", b"\xfe\xff") else "ENCODING"
    return (
        f"is not UTF-8 text (byte {error.start}); convert it with iconv -f {encoding} -t UTF-8, or set "
        "data.on_bad_record=skip"
    )


def _one_of(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ("one of " if len(names) > 1 else "") + ", ".join(names[:_SHOWN]) + more


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


__all__ = ["Record", "UnreadableFile", "is_plain_text", "is_streamed", "records"]
