"""Packs documents into one stream of tokens and reads rows of it.

    S  tokens of the stream: the tokens of every document, each followed by an end-of-text token
    T  sequence_length;  D  depth, the number of MTP modules;  W = T + 1 + D  width of a row

Row r is stream[r·T : r·T + W]; rows overlap by 1 + D tokens, so every token but the stream's first is the
target of the main model exactly once. Each token has the index of its document (-1 for padding), because
attention and targets do not cross documents.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

PADDING = -1
Int32s = npt.NDArray[np.int32]
_Value = TypeVar("_Value", covariant=True)
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBlock:
    """Consecutive rows: `tokens` and `documents`, both int32 [rows·T + 1 + D]."""

    tokens: Int32s
    documents: Int32s

    def targets_per_row(self, sequence_length: int, depth: int) -> Int32s:
        """Valid targets of the main model in each row, int32 [rows]."""
        last = len(self.documents) - depth
        inputs, targets = self.documents[: last - 1], self.documents[1:last]
        valid = (inputs == targets) & (targets != PADDING)
        counts: Int32s = valid.reshape(-1, sequence_length).sum(axis=1, dtype=np.int32)
        return counts


class Fetchable(Protocol[_Value]):
    """A value in this process, or one that can be fetched and pickles as a reference."""

    def get(self) -> _Value:
        """The value; numpy arrays in it may be read-only views."""
        ...


@dataclass(frozen=True, slots=True)
class InMemory(Generic[_Item]):
    """A value in this process."""

    value: _Item

    def get(self) -> _Item:
        """The value."""
        return self.value


class Packer:
    """Packs documents, in their order, into blocks of at most `rows_per_block` rows."""

    def __init__(
        self, *, sequence_length: int, depth: int, end_of_text: int, rows_per_block: int = 16384
    ) -> None:
        self._length, self._depth, self._end = sequence_length, depth, end_of_text
        self._full = rows_per_block * sequence_length
        self._tokens: list[Int32s] = []
        self._documents: list[Int32s] = []
        self._buffered = 0
        self.n_documents = 0
        self.n_tokens = 0

    def add(self, tokens: npt.ArrayLike) -> Iterator[TokenBlock]:
        """Append one document, given without its end-of-text token; yield the blocks that become full."""
        document = np.append(np.asarray(tokens, dtype=np.int32), np.int32(self._end))
        self._append(document, np.full(len(document), self.n_documents, dtype=np.int32))
        self.n_documents += 1
        self.n_tokens += len(document)
        while self._buffered >= self._full + 1 + self._depth:
            yield self._cut(self._full)

    def finish(self, *, pad: bool) -> Iterator[TokenBlock]:
        """Yield the remaining rows.

        Args:
            pad: Fill the last row with padding (end-of-text, document -1), so that every token becomes a
                target; otherwise the tokens after the last full row are dropped.
        """
        if pad:
            rows = -(-(self._buffered - 1) // self._length)
            missing = rows * self._length + 1 + self._depth - self._buffered
            if missing > 0:
                self._append(
                    np.full(missing, self._end, dtype=np.int32), np.full(missing, PADDING, dtype=np.int32)
                )
        else:
            rows = (self._buffered - 1 - self._depth) // self._length
        while rows > 0:  # padding can add one row to a block that is full
            size = min(rows * self._length, self._full)
            yield self._cut(size)
            rows -= size // self._length

    def _append(self, tokens: Int32s, documents: Int32s) -> None:
        self._tokens.append(tokens)
        self._documents.append(documents)
        self._buffered += len(tokens)

    def _cut(self, size: int) -> TokenBlock:
        """Remove the first `size` tokens; the block also holds the next 1 + D tokens, which remain."""
        tokens, documents = np.concatenate(self._tokens), np.concatenate(self._documents)
        width = size + 1 + self._depth
        self._tokens, self._documents = [tokens[size:]], [documents[size:]]
        self._buffered -= size
        return TokenBlock(tokens=tokens[:width].copy(), documents=documents[:width].copy())


class PackedCorpus:
    """Rows by their number, from blocks that are fetched when they are first needed.

    It pickles as references to the blocks, or with the blocks if they are `InMemory`.
    """

    def __init__(
        self,
        blocks: Sequence[Fetchable[TokenBlock]],
        targets: Fetchable[Int32s],
        *,
        n_rows: int,
        rows_per_block: int,
        sequence_length: int,
        depth: int,
        keep_blocks: int = 32,
    ) -> None:
        """Every block but the last holds `rows_per_block` rows; `targets` is int32 [n_rows]."""
        self.n_rows, self.sequence_length, self.depth = n_rows, sequence_length, depth
        self._stored, self._targets = tuple(blocks), targets
        self._rows_per_block, self._keep = rows_per_block, keep_blocks
        self._blocks: OrderedDict[int, TokenBlock] = OrderedDict()

    @property
    def width(self) -> int:
        """Tokens of a row: T + 1 + D."""
        return self.sequence_length + 1 + self.depth

    def row(self, index: int) -> tuple[Int32s, Int32s]:
        """Tokens and documents of one row, int32 [W] each, as read-only views."""
        if not 0 <= index < self.n_rows:
            raise IndexError(f"row {index} of {self.n_rows}")
        block, within = divmod(index, self._rows_per_block)
        span = slice(within * self.sequence_length, within * self.sequence_length + self.width)
        found = self._block(block)
        return found.tokens[span], found.documents[span]

    def rows(self, indices: Iterable[int]) -> tuple[Int32s, Int32s]:
        """Tokens and documents of several rows, int32 [B, W] each, as new arrays."""
        found = [self.row(int(i)) for i in indices]
        return np.stack([tokens for tokens, _ in found]), np.stack([documents for _, documents in found])

    def count_targets(self, indices: Iterable[int]) -> int:
        """Number of valid targets of the main model in several rows."""
        return int(self._targets.get()[np.fromiter(indices, dtype=np.int64)].sum())

    def _block(self, index: int) -> TokenBlock:
        if index in self._blocks:
            self._blocks.move_to_end(index)
        else:
            self._blocks[index] = self._stored[index].get()
            if len(self._blocks) > self._keep:
                self._blocks.popitem(last=False)
        return self._blocks[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": OrderedDict()}


def pack(
    documents: Iterable[npt.ArrayLike],
    *,
    sequence_length: int,
    depth: int,
    end_of_text: int,
    pad: bool = False,
    rows_per_block: int = 16384,
) -> PackedCorpus:
    """Pack token lists in the memory of this process, with the parameters of `Packer`."""
    packer = Packer(
        sequence_length=sequence_length, depth=depth, end_of_text=end_of_text, rows_per_block=rows_per_block
    )
    blocks = [block for document in documents for block in packer.add(document)]
    blocks += packer.finish(pad=pad)
    counts = [block.targets_per_row(sequence_length, depth) for block in blocks]
    targets = np.concatenate([*counts, np.zeros(0, dtype=np.int32)])
    return PackedCorpus(
        [InMemory(block) for block in blocks],
        InMemory(targets),
        n_rows=len(targets),
        rows_per_block=rows_per_block,
        sequence_length=sequence_length,
        depth=depth,
    )


__all__ = ["PADDING", "Fetchable", "InMemory", "PackedCorpus", "Packer", "TokenBlock", "pack"]
