"""Tensors as a stream of frames: flat, one after the other, large ones in pieces, small ones together.

Both ends know the tensors, from the request or from the heading frame of the stream. The sender takes no
lock: it copies tensors into a frame and then checks that they have not changed meanwhile. So a slow reader
delays nothing, and a stream that arrives completely belongs to one state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from google.protobuf.message import DecodeError
from torch import Tensor

from channels.framing import frame_codec
from channels.framing.buffers import plain
from errors import ProtocolError
from protos import expert_pb2

FRAME_BYTES: Final = 4 << 20
_MOST_PIECES: Final = 32  # `channels.framing.header` caches layouts of up to this many tensors


def tensor_frames(tensors: Iterable[Tensor], intact: Callable[[], None]) -> Iterator[bytes]:
    """Encode tensors as frames.

    Args:
        tensors: The tensors, in order.
        intact: Called after each frame has been encoded; raises if the tensors may have changed.
    """
    pieces: list[Tensor] = []
    size = 0
    for tensor in tensors:
        flat = plain(tensor).view(-1)
        most = FRAME_BYTES // flat.element_size()
        for start in range(0, flat.numel(), most):
            piece = flat[start : start + most]
            if pieces and (size + piece.nbytes > FRAME_BYTES or len(pieces) == _MOST_PIECES):
                yield _frame(pieces, intact)
                pieces, size = [], 0
            pieces.append(piece)
            size += piece.nbytes
    if pieces:
        yield _frame(pieces, intact)


def _frame(pieces: Sequence[Tensor], intact: Callable[[], None]) -> bytes:
    frame = frame_codec.encode_reply(pieces)
    intact()
    return frame


class TensorFiller:
    """Fills contiguous tensors from frames.

    Args:
        targets: The tensors, in the order of the stream.

    Attributes:
        at: Index of the tensor that is being filled, among those that are not empty.
    """

    def __init__(self, targets: Sequence[Tensor]) -> None:
        self._targets = [target for target in targets if target.numel()]
        self._filled = 0
        self.at = 0

    def read(self, frames: Iterable[bytes]) -> None:
        """Fill all tensors.

        Raises:
            ProtocolError: the frames carry too few or too many numbers, or another type.
            RaymoeError: from `frames`.
        """
        for frame in frames:
            for piece in frame_codec.decode_reply(frame):
                self._take(piece)
        if self.at < len(self._targets):
            raise ProtocolError(f"a stream of {len(self._targets)} tensors ended within number {self.at}")

    def _take(self, piece: Tensor) -> None:
        if self.at == len(self._targets):
            raise ProtocolError(f"a stream of {len(self._targets)} tensors goes on after the last")
        target = self._targets[self.at].view(-1)
        end = self._filled + piece.numel()
        if piece.ndim != 1 or piece.dtype != target.dtype or end > target.numel():
            raise ProtocolError(
                f"tensor {self.at} of a stream is {target.numel()} numbers of {target.dtype}; from the "
                f"{self._filled}th on there came {list(piece.shape)} of {piece.dtype}"
            )
        target[self._filled : end].copy_(piece)
        self._filled = end
        if end == target.numel():
            self.at, self._filled = self.at + 1, 0


def heading_frame(stored: expert_pb2.StoredState) -> bytes:
    """The first frame of a stream of stored state, which describes the state."""
    return expert_pb2.Frame(header=expert_pb2.Header(stored=stored)).SerializeToString()


def read_heading(frames: Iterator[bytes]) -> expert_pb2.StoredState:
    """Read the first frame of a stream of stored state.

    Raises:
        ProtocolError: the frame does not describe stored state.
    """
    try:
        frame = expert_pb2.Frame.FromString(next(frames, b""))
    except DecodeError as error:
        raise ProtocolError(f"the first frame of a stream cannot be read: {error}") from error
    if not frame.header.HasField("stored"):
        raise ProtocolError("a stream does not begin with what it carries (Header.stored)")
    return frame.header.stored


__all__ = ["FRAME_BYTES", "TensorFiller", "heading_frame", "read_heading", "tensor_frames"]
