"""Tokenizes the texts of requests so that none holds up the others."""

from __future__ import annotations

import asyncio
from functools import partial

from tokenizers import Tokenizer

from errors import DataError
from jobs.confined.process_pool import ConfinedPool
from jobs.data.tokenizer_bounds import encodes_linearly
from jobs.data.tokenizer_process import TokenizerProcess, unencodable

_LONG_TEXT = 10_000  # characters, which take a few milliseconds to tokenize


class TextEncoder:
    """Tokenizes in this process with a tokenizer that takes linear time, and in confined processes otherwise.

    Args:
        tokenizer: The tokenizer.
        waiting: Texts that may wait for a process; further ones are refused.
    """

    def __init__(self, tokenizer: Tokenizer, *, waiting: int) -> None:
        self._tokenizer = tokenizer
        self._pool: ConfinedPool[TokenizerProcess] | None = None
        if not encodes_linearly(tokenizer):
            described = tokenizer.to_str().encode()
            self._pool = ConfinedPool(
                lambda: TokenizerProcess(described),
                name="tokenizer",
                waiting=waiting,
                full="texts wait for the tokenizer",
            )

    @property
    def confined(self) -> bool:
        """Whether texts are tokenized in processes of their own."""
        return self._pool is not None

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The tokens of a text; a long one is tokenized in a thread.

        Raises:
            DataError: The tokenizer cannot encode it, or exceeds a limit.
            ResourceError: No process can be started.
            QueueFull: Too many texts wait already.
        """
        if self._pool is not None:
            try:
                return await self._pool.ask(
                    lambda process: process.encode(text, add_special_tokens=add_special_tokens)
                )
            except DataError as error:
                raise unencodable(error) from None
        if len(text) > _LONG_TEXT:
            # Only batches are encoded without Python's lock, so that the event loop goes on meanwhile.
            call = partial(self._batch, text, add_special_tokens=add_special_tokens)
            return await asyncio.to_thread(call)
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as error:
            raise unencodable(error) from None
        return ids

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.close()

    def _batch(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            found = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        except BaseException as error:  # before asyncio sees a panic, which is no Exception
            raise unencodable(error) from None
        ids: list[int] = found[0].ids
        return ids


__all__ = ["TextEncoder"]
