"""HTTP/2 connections with malformed frames and gRPC messages, drawn from a seeded source."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RESET, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, END_HEADERS, PADDED = 0x1, 0x4, 0x8
GENERATE = "/raymoe.v1.Generation/Generate"


def frame(kind: int, flags: int, stream: int, payload: bytes, *, length: int | None = None) -> bytes:
    """One frame; `length` is what it claims to have, by default what it has."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header field of HPACK, without Huffman codes and without an entry in the table."""
    return b"\x00" + _length(len(name)) + name + _length(len(value)) + value


def _length(size: int) -> bytes:
    if size < 127:
        return bytes([size])
    found, rest = bytearray([127]), size - 127
    while rest >= 128:
        found.append(rest % 128 + 128)
        rest //= 128
    return bytes([*found, rest])


def call_headers(path: str = GENERATE, *fields: tuple[bytes, bytes]) -> bytes:
    """The header block of a gRPC call."""
    usual = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", b"served"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    ]
    return b"".join(literal(name, value) for name, value in (*usual, *fields))


def message(payload: bytes, *, compressed: int = 0, length: int | None = None) -> bytes:
    """A message as gRPC puts it into DATA frames."""
    return bytes([compressed]) + struct.pack(">I", len(payload) if length is None else length) + payload


def malformed_connection(source: random.Random) -> tuple[bytes, int]:
    """What a stranger sends over one connection, and the number of frames in it."""
    frames = list(source.choice(_KINDS)(source))
    begin = b"" if source.random() < 0.1 else PREFACE
    settings = b"" if source.random() < 0.1 else frame(SETTINGS, 0, 0, b"")
    whole = begin + settings + b"".join(frames)
    if source.random() < 0.2:
        whole = _mutated(source, whole)
    return whole, len(frames)


def _mutated(source: random.Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(source.randint(1, 6)):
        at = source.randrange(len(found))
        found[at : at + source.randrange(3)] = source.randbytes(source.randrange(3))
        if not found:
            break
    return bytes(found)


def _random_frames(source: random.Random) -> Iterator[bytes]:
    for _ in range(source.randint(5, 20)):
        payload = source.randbytes(source.choice([0, 1, 4, 5, 6, 8, 9, 40, 300]))
        length = source.choice([None, None, 0, len(payload) + 1, 1 << 14, (1 << 14) + 1, (1 << 24) - 1])
        stream = source.choice([0, 1, 1, 2, 3, 5, 1 << 30, (1 << 31) + 1])
        yield frame(source.randrange(14), source.randrange(256), stream, payload, length=length)


def _bad_messages(source: random.Random) -> Iterator[bytes]:
    for stream in range(1, 20, 2):
        yield frame(HEADERS, END_HEADERS, stream, call_headers())
        sent = source.choice(
            [
                message(b"x", length=(1 << 32) - 1),
                message(b"x" * 50, length=1 << 20),
                message(source.randbytes(30), compressed=source.randrange(256)),
                message(source.randbytes(60)),
                source.randbytes(source.randrange(5)),
                b"\x00" * 9000,
            ]
        )
        yield frame(DATA, source.choice([0, END_STREAM, PADDED]), stream, sent)


def _bad_blocks(source: random.Random) -> Iterator[bytes]:
    """Header blocks that HPACK cannot decode, or that grow: references, sizes, lengths that lie."""
    for stream in range(1, 20, 2):
        block = source.choice(
            [
                bytes([0xFF] * 12),
                b"\x80",
                bytes([0x80 | source.randrange(62, 127)]),
                b"\x3f\xff\xff\xff\xff\x0f",
                b"\x3f\xe1\x1f" * 20,
                b"\x00\x7f\xff\xff\xff\x7f",
                b"\x40\x01a" + b"\x7f\xa1\x1f" + b"b" * 4000 + b"\xbe" * 9000,
                call_headers() + literal(b"x", b"x" * 9000),
                call_headers("/" + "x" * 9000),
                call_headers(GENERATE, *[(b"x-%d" % number, b"y") for number in range(400)]),
                call_headers(
                    GENERATE, (b"X-Upper", b"a"), (b":path", b"/late"), (b"", b""), (b"a\0", b"\r\n")
                ),
                source.randbytes(80),
            ]
        )
        yield frame(HEADERS, source.choice([END_HEADERS, END_HEADERS | END_STREAM]), stream, block)


def _endless_headers(source: random.Random) -> Iterator[bytes]:
    yield frame(HEADERS, 0, 1, call_headers())
    for _ in range(source.randint(5, 60)):
        yield frame(CONTINUATION, 0, 1, source.choice([b"", literal(b"a", b"b" * 200)]))


def _resets(source: random.Random) -> Iterator[bytes]:
    """Calls that are given up at once, as many as a connection takes."""
    for stream in range(1, 2 * source.randint(10, 60), 2):
        yield frame(HEADERS, END_HEADERS, stream, call_headers())
        yield frame(RESET, 0, stream, struct.pack(">I", source.choice([0, 8, 99])))


def _control(source: random.Random) -> Iterator[bytes]:
    for _ in range(source.randint(10, 40)):
        yield source.choice(
            [
                frame(PING, 0, 0, b"12345678"),
                frame(PING, 0, 0, b"123"),
                frame(SETTINGS, 0, 0, struct.pack(">HI", source.randrange(9), source.getrandbits(32))),
                frame(SETTINGS, 0, 0, b"12345"),
                frame(WINDOW, 0, source.choice([0, 1]), struct.pack(">I", source.choice([0, (1 << 31) - 1]))),
                frame(GOAWAY, 0, 0, b"\x00" * 8),
                frame(PRIORITY, 0, 1, struct.pack(">IB", 1, 0)),
                frame(PUSH, END_HEADERS, 1, struct.pack(">I", 2)),
            ]
        )


_KINDS: list[Callable[[random.Random], Iterator[bytes]]] = [
    _random_frames,
    _bad_messages,
    _bad_blocks,
    _endless_headers,
    _resets,
    _control,
]

__all__ = ["GENERATE", "PREFACE", "call_headers", "frame", "literal", "malformed_connection", "message"]
