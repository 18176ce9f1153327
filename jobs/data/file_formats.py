"""Reads the records of one file: plain text, Python source, JSON, JSON lines or Parquet.

Suffixes are read in any case. `.gz` and `.zst` behind another suffix are decompressed.
"""

from __future__ import annotations

import io
import json
import os
import tokenize
import zlib
from collections.abc import Iterator
from typing import Any

from jobs.data.bounded_reading import (
    UnreadableFile,
    decompressed,
    excess_of_values,
    most_expanded,
    read_lines,
    read_whole,
    regular_file,
    too_expanded,
)

_JSON_LINES, _JSON, _PARQUET, _SOURCE = (".jsonl", ".ndjson"), (".json",), (".parquet",), (".py",)
_COMPRESSED = (".gz", ".zst")
_BOM = "\ufeff"
_SHOWN = 12  # names of fields in a message
_DAMAGE = (EOFError, zlib.error, OSError)  # Arrow and gzip raise OSErrors without a number

Record = tuple[str, str | None, str]
"""A record's place in its file (such as `line 7`), its text, and why it has none."""


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


def _text(path: str, *, source: bool) -> str:
    data = read_whole(path)
    if not source:
        return data.decode("utf-8-sig")
    try:  # Python source declares its own encoding, which need not be one of text
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = io.TextIOWrapper(io.BytesIO(data), encoding).read()
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
        with decompressed(path) as file:
            for number, line in enumerate(read_lines(file), start=1):
                if line.strip():
                    yield (f"line {number}", *_parsed(line, text_field))
    except _DAMAGE as error:
        raise UnreadableFile(_damage(error, f" after line {number}" if number else "")) from None


def _json(path: str, text_field: str) -> Iterator[Record]:
    """The records of a list, of one object, or of lines that are an object each."""
    whole = read_whole(path)
    if excess := excess_of_values(whole):
        raise UnreadableFile(f"is {excess}; split it, or write JSON lines")
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
        with regular_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            left = most_expanded(size)  # a text that many rows have is stored once, and read as often
            for number, value in enumerate(_column(file, size, text_field), start=1):
                try:
                    found = value.as_py()
                    left -= len(found) if isinstance(found, str | bytes) else 0
                    record = _field({text_field: found}, text_field)
                except UnicodeDecodeError as error:
                    left -= len(error.object)
                    record = None, _not_utf8(error)
                if left < 0:
                    raise too_expanded(size)
                yield (f"row {number}", *record)
    except (pyarrow.ArrowException, OSError) as error:
        if number or isinstance(error, OSError):
            raise UnreadableFile(_damage(error, f" after row {number}" if number else "")) from None
        raise UnreadableFile(f"is not a Parquet file ({_line(error)})") from None


def _column(file: io.BufferedIOBase, size: int, text_field: str) -> Iterator[Any]:
    """The values of a column of a Parquet file of `size` bytes, as scalars of Arrow.

    Raises:
        UnreadableFile: There is no such column, it cannot hold text, or it holds more than `most_expanded`.
    """
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(pyarrow.PythonFile(file, "r"))
    columns = table.schema_arrow.names
    if text_field not in columns:
        raise UnreadableFile(f"has no column {text_field!r}; set data.text_field to {_one_of(columns)}")
    leaves = [table.schema.column(i) for i in range(len(table.schema))]
    kinds = {leaf.physical_type for leaf in leaves if leaf.path == text_field}
    if not kinds or "FIXED_LEN_BYTE_ARRAY" in kinds:
        kind = table.schema_arrow.field(text_field).type
        raise UnreadableFile(
            f"has no text in the column {text_field!r}, which is {kind}; set data.text_field"
        )
    groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    if sum(one.total_uncompressed_size for one in chunks if one.path_in_schema == text_field) > most_expanded(
        size
    ):
        raise too_expanded(size)
    if "BYTE_ARRAY" in kinds:  # rows then refer to their texts, of which a batch would have a copy for each
        file.seek(0)
        table = pyarrow.parquet.ParquetFile(pyarrow.PythonFile(file, "r"), read_dictionary=[text_field])
    for batch in table.iter_batches(columns=[text_field], batch_size=1024):
        yield from batch.column(0)


def _parsed(line: bytes, text_field: str) -> tuple[str | None, str]:
    """The text in a line of JSON, and why it has none."""
    if excess := excess_of_values(line):
        return None, f"{excess}; split or remove it"
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
        return None, f"is {_kind(value)}, not an object with the field {text_field!r}"
    text = value.get(text_field)
    if not isinstance(text, str):
        if text_field in value:
            return (
                None,
                f"has no text in the field {text_field!r}, which is {_kind(text)}; set data.text_field",
            )
        there = [name for name, inner in value.items() if isinstance(inner, str)] or list(value)
        fix = f"set data.text_field to {_one_of(there)}" if there else "it has no fields"
        return None, f"has no text in the field {text_field!r}; {fix}"
    half = _half_character(text)
    return (None, half) if half else (text, "")


def _kind(value: Any) -> str:
    """What a value of a record is, in JSON's words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"of the type {type(value).__name__}")


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
