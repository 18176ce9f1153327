"""Conversion of tensors, hosts, routing tables and host statistics to protobuf messages and back."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from actors.messages.host_control import HostStats
from cluster.topology import HostInfo, RoutingTable
from errors import ProtocolError
from protos import coordinator_pb2, expert_pb2, tensor_pb2

DTYPES = {
    torch.float32: tensor_pb2.DTYPE_FLOAT32,
    torch.float64: tensor_pb2.DTYPE_FLOAT64,
    torch.bfloat16: tensor_pb2.DTYPE_BFLOAT16,
    torch.float16: tensor_pb2.DTYPE_FLOAT16,
    torch.int32: tensor_pb2.DTYPE_INT32,
    torch.int64: tensor_pb2.DTYPE_INT64,
}
TORCH_DTYPES = {code: dtype for dtype, code in DTYPES.items()}


def tensor_to(tensor: Tensor) -> tensor_pb2.Tensor:
    """A tensor as a protobuf message, for control calls."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return tensor_pb2.Tensor(dtype=DTYPES[tensor.dtype], shape=tensor.shape, data=flat.numpy().tobytes())


def tensor_from(message: tensor_pb2.Tensor) -> Tensor:
    """The inverse of `tensor_to`.

    Raises:
        ProtocolError: The number of bytes does not fit the type and shape.
    """
    shape = list(message.shape)
    dtype = TORCH_DTYPES.get(message.dtype)
    if dtype is None:
        raise ProtocolError(f"a tensor of unknown type {message.dtype} came in")
    out = torch.empty(shape, dtype=dtype)
    if len(message.data) != out.numel() * out.element_size():
        raise ProtocolError(f"{len(message.data)} bytes came in for a tensor {shape} of {dtype}")
    return torch.frombuffer(bytearray(message.data), dtype=dtype).reshape(shape) if out.numel() else out


def host_to(host: HostInfo) -> coordinator_pb2.HostInfo:
    """A `HostInfo` as a protobuf message."""
    return coordinator_pb2.HostInfo(id=host.id, node=host.node, addresses=dict(host.addresses), pid=host.pid)


def host_from(message: coordinator_pb2.HostInfo) -> HostInfo:
    """The inverse of `host_to`."""
    return HostInfo(id=message.id, node=message.node, pid=message.pid, addresses=dict(message.addresses))


def table_to(table: RoutingTable) -> coordinator_pb2.RoutingTable:
    """A `RoutingTable` as a protobuf message."""
    return coordinator_pb2.RoutingTable(
        epoch=table.epoch,
        hosts=[host_to(host) for host in table.hosts],
        n_layers=len(table.holders),
        n_experts=len(table.holders[0]) if table.holders else 0,
        holders=[host for row in table.holders for hosts in row for host in hosts],
        holder_counts=[len(hosts) for row in table.holders for hosts in row],
        weights=table.weights,
        serial=table.serial,
    )


def table_from(message: coordinator_pb2.RoutingTable) -> RoutingTable:
    """The inverse of `table_to`.

    Raises:
        ProtocolError: The numbers of layers, experts, holders and hosts contradict each other.
    """
    n_layers, n_experts = message.n_layers, message.n_experts
    counts, flat = list(message.holder_counts), iter(message.holders)
    fits = len(counts) == n_layers * n_experts and sum(counts) == len(message.holders)
    if not fits or any(not 0 <= host < len(message.hosts) for host in message.holders):
        raise ProtocolError(
            f"a routing table of {n_layers} layers, {n_experts} experts and {len(message.hosts)} hosts names "
            f"{len(message.holders)} holders of {len(counts)} experts"
        )
    holders = [tuple(islice(flat, count)) for count in counts]
    return RoutingTable(
        epoch=message.epoch,
        hosts=tuple(host_from(host) for host in message.hosts),
        holders=tuple(tuple(holders[row * n_experts : (row + 1) * n_experts]) for row in range(n_layers)),
        weights=message.weights,
        serial=message.serial,
    )


def stats_to(stats: HostStats) -> expert_pb2.StatusReply:
    """A `HostStats` as a protobuf message."""
    return expert_pb2.StatusReply(
        id=stats.id,
        epoch=stats.epoch,
        step=stats.step,
        parameters=stats.parameters,
        kept=stats.kept,
        kept_bytes=stats.kept_bytes,
        rows=stats.rows,
        requests=stats.requests,
        busy_seconds=stats.busy_seconds,
        in_flight=stats.in_flight,
        epochs=stats.epochs,
        experts=dict(stats.experts),
        failed_pushes=stats.failed_pushes,
    )


def stats_from(message: expert_pb2.StatusReply) -> HostStats:
    """The inverse of `stats_to`."""
    return HostStats(
        id=message.id,
        step=message.step,
        epoch=message.epoch,
        kept=message.kept,
        kept_bytes=message.kept_bytes,
        parameters=message.parameters,
        requests=dict(message.requests),
        rows=message.rows,
        busy_seconds=message.busy_seconds,
        in_flight=message.in_flight,
        epochs=tuple(message.epochs),
        experts=dict(message.experts),
        failed_pushes=message.failed_pushes,
    )


__all__ = [
    "DTYPES",
    "TORCH_DTYPES",
    "host_from",
    "host_to",
    "stats_from",
    "stats_to",
    "table_from",
    "table_to",
    "tensor_from",
    "tensor_to",
]
