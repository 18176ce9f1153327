"""Files as nobody means well by: JSON that is deep, wide or huge, and what is no file at all."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

Make = Callable[[Path], None]
"""Puts a hostile file in the place of a path, which has none."""

SPARSE = 10 << 30  # bytes that take no room on the disk


def _bytes(data: bytes) -> Make:
    return lambda path: (path.write_bytes(data), None)[1]


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, SPARSE)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    """A Unix socket; its name may be short only, so it is bound by way of the directory's descriptor."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def _link(target: str) -> Make:
    return lambda path: path.symlink_to(target)


def _link_to_fifo(path: Path) -> None:
    pipe = path.with_name("pipe")
    if not pipe.exists():
        os.mkfifo(pipe)
    path.symlink_to(pipe)


def _loop(path: Path) -> None:
    path.symlink_to(path)


NO_FILES: Mapping[str, tuple[Make, str]] = {
    "named pipe": (_fifo, "it is a named pipe, not a file"),
    "link to a pipe": (_link_to_fifo, "it is a named pipe, not a file"),
    "socket": (_socket, "it is a socket, not a file"),
    "directory": (lambda path: path.mkdir(), "it is a directory, not a file"),
    "device": (_link("/dev/zero"), "it is a device, not a file"),
    "terminal": (_link("/dev/tty"), "it is a device, not a file"),
    "link to itself": (_loop, "symbolic links"),
    "file that grows": (_link("/proc/self/status"), "changed while it was read"),
}
"""What is no regular file, with words of the error; for every kind of file."""

SIZES: Mapping[str, tuple[Make, str]] = {
    "10 GiB, sparse": (_sparse, "it has 10,737,418,240 bytes, and such a file has at most "),
}
"""Files that are too large, for every kind of file but weights."""

NO_TEXTS: Mapping[str, tuple[Make, str]] = {
    "Latin-1": (_bytes('{"a": "é"}'.encode("latin-1")), "byte 7 is not UTF-8"),
    "UTF-16": (_bytes('{"a": 1}'.encode("utf-16")), "byte 0 is not UTF-8"),
    "half a character as bytes": (_bytes(b'{"a": "\xed\xa0\x80"}'), "byte 7 is not UTF-8"),
}
"""What is no text in UTF-8."""

JSON: Mapping[str, tuple[Make, str]] = {
    "100,000 lists deep": (_bytes(b"[" * 100_000), "nested more than 64 deep"),
    "100,000 objects deep": (_bytes(b'{"a":' * 100_000), "nested more than 64 deep"),
    "closed, 500 deep": (_bytes(b'{"a":' + b"[" * 500 + b"]" * 500 + b"}"), "nested more than 64 deep"),
    "wide": (_bytes(b'{"a":[' + b"[]," * 1_200_000 + b"[]]}"), "values"),
    "number of 5,000 digits": (_bytes(b'{"a": 1' + b"0" * 5000 + b"}"), "a number has thousands of digits"),
    "number of 1,000 digits": (_bytes(b'{"a": -1' + b"0" * 1000 + b"}"), "more than 40 digits"),
    "half a character": (_bytes(rb'{"a": "\ud83d"}'), "half of a surrogate pair"),
    "half a character in a key": (_bytes(rb'{"\udc00": 1}'), "half of a surrogate pair"),
    "byte order mark": (_bytes(b"\xef\xbb\xbf{}"), "byte order mark; save it as UTF-8 without"),
    "list": (_bytes(b"[{}]"), "it holds no JSON object"),
    "null": (_bytes(b"null"), "it holds no JSON object"),
    "empty": (_bytes(b""), "line 1, column 1 is not JSON"),
    "zero bytes": (_bytes(b"\0" * 4096), "line 1, column 1 is not JSON"),
    "cut short": (_bytes(b'{"a": '), "line 1, column 7 is not JSON"),
    "two objects": (_bytes(b"{}\n{}"), "line 2, column 1 is not JSON"),
}
"""JSON that cannot be read, for every JSON file."""

NOT_FINITE: Mapping[str, tuple[Make, str]] = {
    "NaN": (_bytes(b'{"a": [NaN]}'), "NaN or Infinity"),
    "Infinity": (_bytes(b'{"a": {"b": -Infinity}}'), "NaN or Infinity"),
    "too large for a float": (_bytes(b'{"a": 1e999}'), "NaN or Infinity"),
}
"""Numbers that JSON lacks."""


def _shard(header: bytes, data: bytes = b"", *, length: int | None = None) -> Make:
    prefix = struct.pack("<Q", len(header) if length is None else length)
    return _bytes(prefix + header + data)


def _tensor(dtype: str = "F32", shape: str = "[1]", offsets: str = "[0,4]") -> bytes:
    return f'{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}'.encode()


def _sparse_header(path: Path) -> None:
    """A header of 1 GiB in a file of 10."""
    path.write_bytes(struct.pack("<Q", 1 << 30))
    os.truncate(path, SPARSE)


SHARDS: Mapping[str, tuple[Make, str]] = {
    "empty": (_bytes(b""), "damaged or cut short"),
    "no header": (_shard(b"", length=1), "damaged or cut short"),
    "longest header": (_shard(b"{}", length=2**64 - 1), "damaged or cut short"),
    "header beyond the file": (_shard(b"{}", length=3), "damaged or cut short"),
    "header of 1 GiB": (_sparse_header, "its header has 1,073,741,824 bytes, and such a header has at most"),
    "wide header": (_shard(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"), "its header has more than 4,000,000"),
    "deep header": (_shard(b"[" * 100_000), "damaged or cut short"),
    "deep object": (_shard(b'{"a":' * 100_000), "damaged or cut short"),
    "no JSON": (_shard(b"\xff" * 64), "damaged or cut short"),
    "unknown dtype": (_shard(_tensor("Z9" * 5_000), b"abcd"), "damaged or cut short"),
    "offsets beyond the file": (_shard(_tensor(offsets="[0,400]", shape="[100]"), b"abcd"), "damaged or"),
    "offsets backwards": (_shard(_tensor(offsets="[4,0]"), b"abcd"), "damaged or cut short"),
    "offsets that leave a gap": (_shard(_tensor(offsets="[4,8]"), b"abcdefgh"), "damaged or cut short"),
    "overlapping tensors": (
        _shard(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"abcd",
        ),
        "damaged or cut short",
    ),
    "shape of 2**120": (_shard(_tensor(shape=f"[{1 << 60},{1 << 60}]"), b"abcd"), "damaged or cut short"),
    "negative shape": (_shard(_tensor(shape="[-1]"), b"abcd"), "damaged or cut short"),
    "shape of another size": (_shard(_tensor(shape="[2]"), b"abcd"), "damaged or cut short"),
    "bytes after the tensors": (_shard(_tensor(), b"abcdefgh"), "damaged or cut short"),
}
"""Safetensors files that are damaged."""

INDEXES: Mapping[str, tuple[Make, str]] = {
    "no map": (_bytes(b"{}"), "weight_map does not map"),
    "list for a map": (_bytes(b'{"weight_map": []}'), "weight_map does not map"),
    "file outside": (_bytes(b'{"weight_map": {"a": "../../etc/passwd"}}'), "none of its directory"),
    "absolute file": (_bytes(b'{"weight_map": {"a": "/etc/passwd"}}'), "none of its directory"),
    "the directory": (_bytes(b'{"weight_map": {"a": "."}}'), "none of its directory"),
    "zero byte": (_bytes(rb'{"weight_map": {"a": "b\u0000c"}}'), "none of its directory"),
}
"""Indexes whose files cannot be."""

NUMBERS: Mapping[str, tuple[object, ...]] = {
    "hidden_size": (10**12, -1, 0, "x", 1.5, None, [], {}, 10**39),
    "num_hidden_layers": (10**9, -1, 0),
    "num_nextn_predict_layers": (10**9, -1),
    "first_k_dense_replace": (10**9, -1),
    "n_routed_experts": (10**7, -1, 0),
    "num_experts_per_tok": (10**9, -1, 0),
    "n_group": (10**9, -1, 0),
    "topk_group": (10**9, -1, 0),
    "n_shared_experts": (10**9, -1),
    "vocab_size": (10**10, -1, 0),
    "num_attention_heads": (10**9, -1, 0),
    "kv_lora_rank": (10**12, -1, 0),
    "q_lora_rank": (10**12, -1, 0),
    "qk_nope_head_dim": (10**9, -1, 0),
    "qk_rope_head_dim": (10**9, -1, 0, 3),
    "v_head_dim": (10**9, -1, 0),
    "intermediate_size": (10**12, -1, 0),
    "moe_intermediate_size": (10**12, -1, 0),
    "max_position_embeddings": (10**12, -1, 0),
    "rms_norm_eps": (-1.0, 0),
    "rope_theta": (-1.0, 0),
}
"""Values of config.json's fields that no model has."""

__all__ = [
    "INDEXES",
    "JSON",
    "NOT_FINITE",
    "NO_FILES",
    "NO_TEXTS",
    "NUMBERS",
    "SHARDS",
    "SIZES",
    "SPARSE",
    "Make",
]
