"""Orders to move experts, and what hosts keep in memory, as protobuf messages, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from actors.messages.control_codec import DTYPES, TORCH_DTYPES, host_from, host_to
from actors.messages.tensor_stream import frames, head
from actors.messages.transfer_orders import Assembly, Blob, ExpertIds, Origin, Pull, Stored
from errors import ProtocolError
from protos import expert_pb2

_MOST_ELEMENTS = 1 << 40


def experts_to(experts: ExpertIds) -> list[expert_pb2.LayerExperts]:
    """See `ExpertIds`."""
    return [expert_pb2.LayerExperts(layer=layer, experts=ids) for layer, ids in experts.items()]


def experts_from(message: Iterable[expert_pb2.LayerExperts]) -> dict[int, tuple[int, ...]]:
    """The inverse of `experts_to`."""
    return {one.layer: tuple(one.experts) for one in message}


def assembly_to(order: Assembly) -> expert_pb2.AssembleRequest:
    """See `Assembly`."""
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
    """See `Pull`."""
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


def stored_to(stored: Stored) -> expert_pb2.StoredState:
    """See `Stored`."""
    return expert_pb2.StoredState(
        kind=stored.kind,
        of=stored.of,
        step=stored.step,
        epoch=stored.epoch,
        experts=experts_to(stored.experts),
        pushed=stored.pushed,
        failed=dict(stored.failed),
    )


def stored_from(message: expert_pb2.StoredState) -> Stored:
    """The inverse of `stored_to`."""
    return Stored(
        kind=message.kind,
        of=message.of,
        step=message.step,
        epoch=message.epoch,
        experts=experts_from(message.experts),
        pushed=tuple(message.pushed),
        failed=dict(message.failed),
    )


def blob_to(blob: Blob) -> expert_pb2.StoredState:
    """What a `Blob` is, without its tensors' bytes.

    Raises:
        ProtocolError: a tensor of a type that the wire does not know.
    """
    for name, tensor in blob.tensors.items():
        if tensor.dtype not in DTYPES:
            raise ProtocolError(f"{name} is {tensor.dtype}, which does not travel")
    return expert_pb2.StoredState(
        kind=blob.name,
        of=blob.name,
        step=blob.step,
        epoch=-1,
        tensors=tensor_shapes(blob.tensors),
        note=blob.note,
    )


def tensor_shapes(tensors: Mapping[str, Tensor]) -> list[expert_pb2.StoredTensor]:
    """Names, types and shapes of tensors that the wire knows."""
    return [
        expert_pb2.StoredTensor(name=name, dtype=DTYPES[tensor.dtype], shape=tensor.shape)
        for name, tensor in tensors.items()
    ]


def blob_from(message: expert_pb2.StoredState, tensors: Mapping[str, Tensor]) -> Blob:
    """The inverse of `blob_to`, with its tensors."""
    return Blob(name=message.of, step=message.step, tensors=tensors, note=message.note)


def empty_tensors(message: expert_pb2.StoredState) -> dict[str, Tensor]:
    """Memory for the tensors of a blob.

    Raises:
        ProtocolError: an unknown type or an absurd shape.
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
    """The stream of a blob, whose tensors must not change until it has been read."""
    yield head(blob_to(blob))
    yield from frames(blob.tensors.values(), lambda: None)


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
