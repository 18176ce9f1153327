"""Confined processes for the tokenizers of strangers: one tries a tokenizer.json, others encode texts."""

from __future__ import annotations

import hashlib

from tokenizers import Tokenizer

from errors import DataError, reason
from jobs.confined.confined_process import ConfinedProcess, ProcessLimits
from jobs.data.tokenizer_bounds import encodes_linearly

_WORKER = "jobs.data.tokenizer_worker"
_MIB = 1 << 20
_checked: set[bytes] = set()  # digests of what this process has tried already


def tokenizer_limits(size: int) -> ProcessLimits:
    """What loading a tokenizer.json of so many bytes may take, and trying it or encoding a text.

    That of Gemma 3, of 33 MB, takes about a quarter of it.
    """
    return ProcessLimits(cpu_seconds=5.0 + size / (4 * _MIB), seconds=600.0, memory=512 * _MIB + 16 * size)


class TokenizerProcess:
    """Starts a process for a tokenizer and asks it for tokens; used by one thread at a time.

    Args:
        described: The tokenizer.json.

    Raises:
        DataError: The process cannot load it.
    """

    def __init__(self, described: bytes) -> None:
        self._process = ConfinedProcess(_WORKER, tokenizer_limits(len(described)), data=described)

    @property
    def alive(self) -> bool:
        """Whether the process has not been ended."""
        return self._process.alive

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text.

        Raises:
            DataError: The tokenizer cannot encode it, or exceeds a limit; then `alive` may be false.
        """
        ids: list[int] = self._process.ask({"text": text, "special": add_special_tokens})
        return ids

    def attempt(self) -> None:
        """Encode some texts and decode some tokens.

        Raises:
            DataError: That fails, or exceeds a limit.
        """
        self._process.ask(None)

    def lives(self) -> bool:
        """Whether the process can be asked."""
        return self._process.lives()

    def close(self) -> None:
        """End the process."""
        self._process.close()


def check_tokenizer(described: bytes) -> None:
    """Check that a tokenizer.json can be loaded, encodes and decodes, within limits of time and memory.

    Raises:
        DataError: It cannot; the text says why.
    """
    digest = hashlib.blake2b(described).digest()
    if digest in _checked:
        return
    process = TokenizerProcess(described)
    try:
        process.attempt()
    finally:
        process.close()
    _checked.add(digest)


def encode_once(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text, in a confined process unless the tokenizer takes linear time.

    Raises:
        DataError: The tokenizer cannot encode it, or exceeds a limit.
    """
    if encodes_linearly(tokenizer):
        try:
            ids: list[int] = tokenizer.encode(text).ids
        except BaseException as error:
            raise unencodable(error) from None
        return ids
    process = TokenizerProcess(tokenizer.to_str().encode())
    try:
        return process.encode(text)
    except DataError as error:
        raise unencodable(error) from None
    finally:
        process.close()


def unencodable(error: BaseException) -> DataError:
    """The error for what the library raises, whose panics are no `Exception`; other signals are raised."""
    if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
        raise error
    return DataError(
        f"the tokenizer cannot encode the text ({reason(error)}); check the tokenizer.json of the model"
    )


__all__ = ["TokenizerProcess", "check_tokenizer", "encode_once", "tokenizer_limits", "unencodable"]
