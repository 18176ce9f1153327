"""Conversions between transfer orders, stored copies and their protobuf messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from actors.messages.control_codec import DTYPES, TORCH_DTYPES, host_from, host_to
from actors.messages.tensor_stream import heading_frame, tensor_frames
from actors.messages.transfer_orders import Assembly, Blob, ExpertIds, Origin, Pull, StoredCopy
from errors import ProtocolError
from protos import expert_pb2

_MOST_ELEMENTS = 1 << 40


def experts_to(experts: ExpertIds) -> list[expert_pb2.LayerExperts]:
    """Expert ids as messages, one for each layer."""
    return [expert_pb2.LayerExperts(layer=layer, experts=ids) for layer, ids in experts.items()]


def experts_from(message: Iterable[expert_pb2.LayerExperts]) -> dict[int, tuple[int, ...]]:
    """The inverse of `experts_to`."""
    return {one.layer: tuple(one.experts) for one in message}


def assembly_to(order: Assembly) -> expert_pb2.AssembleRequest:
    """An assembly order as a message."""
    return expert_pb2.AssembleRequest(
        epoch=order.epoch,
        experts=experts_to(order.experts),
        base=order.base,
        step=order.step,
        origins=map(_origin_to, order.origins),
        directory=order.directory,
        moments=order.moments,
        shared=map(_origin_to, order.shared),
    )


def assembly_from(message: expert_pb2.AssembleRequest) -> Assembly:
    """The inverse of `assembly_to`."""
    return Assembly(
        epoch=message.epoch,
        experts=experts_from(message.experts),
        base=message.base if message.HasField("base") else None,
        step=message.step if message.HasField("step") else None,
        origins=tuple(map(_origin_from, message.origins)),
        directory=message.directory if message.HasField("directory") else None,
        moments=message.moments,
        shared=tuple(map(_origin_from, message.shared)),
    )


def _origin_to(origin: Origin) -> expert_pb2.Origin:
    return expert_pb2.Origin(host=host_to(origin.host), experts=experts_to(origin.experts))


def _origin_from(message: expert_pb2.Origin) -> Origin:
    return Origin(host=host_from(message.host), experts=experts_from(message.experts))


def pull_to(pull: Pull) -> expert_pb2.FetchRequest:
    """A pull as a message."""
    return expert_pb2.FetchRequest(
        experts=experts_to(pull.experts),
        base=pull.base,
        step=pull.step,
        moments=pull.moments,
        gradients=pull.gradients,
    )


def pull_from(message: expert_pb2.FetchRequest) -> Pull:
    """The inverse of `pull_to`."""
    return Pull(
        experts=experts_from(message.experts),
        base=message.base if message.HasField("base") else None,
        step=message.step if message.HasField("step") else None,
        moments=message.moments,
        gradients=message.gradients,
    )


def stored_to(stored: StoredCopy) -> expert_pb2.StoredState:
    """The description of a stored copy as a message."""
    return expert_pb2.StoredState(
        kind=stored.kind,
        owner=stored.owner,
        step=stored.step,
        epoch=stored.epoch,
        experts=experts_to(stored.experts),
        pushed=stored.pushed,
        failed=dict(stored.failed),
    )


def stored_from(message: expert_pb2.StoredState) -> StoredCopy:
    """The inverse of `stored_to`."""
    return StoredCopy(
        kind=message.kind,
        owner=message.owner,
        step=message.step,
        epoch=message.epoch,
        experts=experts_from(message.experts),
        pushed=tuple(message.pushed),
        failed=dict(message.failed),
    )


def blob_to(blob: Blob) -> expert_pb2.StoredState:
    """The description of a blob: names, types and shapes of its tensors, without their bytes.

    Raises:
        ProtocolError: a tensor's type does not exist on the wire.
    """
    for name, tensor in blob.tensors.items():
        if tensor.dtype not in DTYPES:
            raise ProtocolError(f"{name} is {tensor.dtype}, which does not travel")
    return expert_pb2.StoredState(
        kind=blob.name,
        owner=blob.name,
        step=blob.step,
        epoch=-1,
        tensors=tensor_shapes(blob.tensors),
        note=blob.note,
    )


def tensor_shapes(tensors: Mapping[str, Tensor]) -> list[expert_pb2.StoredTensor]:
    """Names, types and shapes of tensors, whose types must exist on the wire."""
    return [
        expert_pb2.StoredTensor(name=name, dtype=DTYPES[tensor.dtype], shape=tensor.shape)
        for name, tensor in tensors.items()
    ]


def blob_from(message: expert_pb2.StoredState, tensors: Mapping[str, Tensor]) -> Blob:
    """A blob from its description and its tensors."""
    return Blob(name=message.owner, step=message.step, tensors=tensors, note=message.note)


def empty_tensors(message: expert_pb2.StoredState) -> dict[str, Tensor]:
    """Uninitialized tensors with the types and shapes that a blob's description names.

    Raises:
        ProtocolError: a type is unknown, or a shape is negative or too large.
    """
    made = {}
    for one in message.tensors:
        shape, dtype = tuple(one.shape), TORCH_DTYPES.get(one.dtype)
        count = 1
        for extent in shape:
            count *= extent
        if dtype is None or min(shape, default=0) < 0 or count > _MOST_ELEMENTS:
            raise ProtocolError(f"{one.name} cannot be {list(shape)} of type {one.dtype}")
        made[one.name] = torch.empty(shape, dtype=dtype)
    return made


def blob_frames(blob: Blob) -> Iterator[bytes]:
    """A blob as a stream of frames; its tensors must not change until the stream has been read."""
    yield heading_frame(blob_to(blob))
    yield from tensor_frames(blob.tensors.values(), lambda: None)


__all__ = [
    "assembly_from",
    "assembly_to",
    "blob_frames",
    "blob_from",
    "blob_to",
    "empty_tensors",
    "experts_from",
    "experts_to",
    "pull_from",
    "pull_to",
    "stored_from",
    "stored_to",
    "tensor_shapes",
]
