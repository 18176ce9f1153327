"""Malformed and ambiguous HTTP requests, drawn from a seeded source."""

from __future__ import annotations

import random

_HIDDEN = b"GET /smuggled HTTP/1.1\r\nHost: served\r\n\r\n"


def malformed_request(source: random.Random) -> bytes:
    """The bytes of one request that a server has to refuse, or may take as one request, and never as two."""
    return source.choice(_KINDS)(source)


def _head(*lines: bytes, first: bytes = b"POST /v1/completions HTTP/1.1") -> bytes:
    return b"\r\n".join([first, b"Host: served", *lines, b"", b""])


def _length_and_chunks(source: random.Random) -> bytes:
    coding = source.choice(
        [b"chunked", b"Chunked", b" chunked", b"\tchunked", b"chunked ", b"identity, chunked"]
    )
    name = source.choice(
        [b"Transfer-Encoding", b"transfer-encoding", b"Transfer-Encoding ", b" Transfer-Encoding"]
    )
    lines = [b"Content-Length: %d" % source.choice([0, 4, 5, 6, len(_HIDDEN) + 5]), name + b": " + coding]
    source.shuffle(lines)
    return _head(*lines) + b"0\r\n\r\n" + _HIDDEN


def _two_lengths(source: random.Random) -> bytes:
    first, second = source.sample(
        [b"0", b"5", b"+5", b"0x5", b"5,5", b"-1", b"05", b" 5", b"5 6", b"9" * 30], 2
    )
    return _head(b"Content-Length: " + first, b"Content-Length: " + second) + b"hello" + _HIDDEN


def _folded(source: random.Random) -> bytes:
    fold = source.choice([b"\r\n ", b"\r\n\t", b"\n ", b"\r "])
    return (
        _head(b"X-Folded: a" + fold + b"Transfer-Encoding: chunked", b"Content-Length: 5")
        + b"hello"
        + _HIDDEN
    )


def _bad_chunks(source: random.Random) -> bytes:
    size = source.choice(
        [b"zz", b"-1", b"0x5", b"5;" + b"e" * 9000, b"ffffffffffffffffff", b"", b" 5", b"5\n", b"1" * 400]
    )
    return _head(b"Transfer-Encoding: chunked") + size + b"\r\nhello\r\n0\r\n\r\n" + _HIDDEN


def _bad_bytes(source: random.Random) -> bytes:
    byte = bytes([source.choice([0, 1, 10, 13, 127, 128, 255])])
    return source.choice(
        [
            _head(b"X: a" + byte + b"b"),
            _head(b"X" + byte + b": a"),
            _head(first=b"GET /a" + byte + b"b HTTP/1.1"),
            _head(first=b"G" + byte + b"T / HTTP/1.1"),
        ]
    )


def _bad_first_line(source: random.Random) -> bytes:
    method = source.choice(
        [b"GET", b"get", b"", b"CONNECT", b"TRACE", b"PRI", b"M" * 5000, b"G E T", b"GET\t"]
    )
    target = source.choice(
        [
            *(
                b"/",
                b"*",
                b"",
                b"http://other/v1/models",
                b"//",
                b"/../../etc/passwd",
                b"/%00",
                b"/%zz",
                b"?",
                b"#",
            ),
            *(
                b"/" + b"x" * 20_000,
                b"served:80",
                b"http://" + b"a" * 9000,
                b"/a b",
                b"\\",
                b"/v1/models#/health",
            ),
        ]
    )
    version = source.choice(
        [b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9.9", b"HTTP/1.1 x", b"", b"h"]
    )
    return _head(first=b" ".join([method, target, version]))


def _many_or_large_fields(source: random.Random) -> bytes:
    if source.random() < 0.5:
        return _head(*(b"X-%d: 1" % number for number in range(source.choice([101, 1000, 20_000]))))
    return _head(b"X: " + b"x" * source.choice([16_384, 65_536, 1 << 20]))


def _bad_field(source: random.Random) -> bytes:
    return _head(
        source.choice(
            [
                *(
                    b": a",
                    b"no colon",
                    b"Host: other",
                    b"Host : other",
                    b"X:",
                    b"Expect: 200-maybe",
                    b"\xff\xfe: a",
                ),
                *(
                    b"Connection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
                    b"TE: trailers",
                ),
                *(
                    b"Authorization: Bearer",
                    b"Authorization: Bearer \r\nAuthorization: Bearer x",
                    b"Range: bytes=-1",
                ),
            ]
        )
    )


def _noise(source: random.Random) -> bytes:
    return source.choice(
        [b"", b"\r\n\r\n", b"\x16\x03\x01", b"\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    ) + (source.randbytes(source.randrange(2000)))


def _cut(source: random.Random) -> bytes:
    whole = _head(b"Content-Length: 5", b"Content-Type: application/json") + b"hello"
    return whole[: source.randrange(len(whole))]


_KINDS = [
    _length_and_chunks,
    _two_lengths,
    _folded,
    _bad_chunks,
    _bad_bytes,
    _bad_first_line,
    _many_or_large_fields,
    _bad_field,
    _noise,
    _cut,
]

__all__ = ["malformed_request"]
