"""Which channel is taken between two processes, with and without GPUs."""

from __future__ import annotations

import pytest

from channels import choose
from channels.cuda import channel as cuda
from channels.cuda.device_memory import DeviceSegment
from errors import (
    ChannelError,
    ConfigError,
    ProtocolError,
    ResourceError,
)
from support.fakes.device_memory import PretendedMemory


def test_auto_takes_the_nearest_that_both_ends_share() -> None:
    addresses = {kind: f"{kind}:x" for kind in ("local", "shm", "collective", "grpc")}

    def pick(kind: str, offered: dict[str, str], *, same_process: bool, same_machine: bool) -> str:
        return choose.ways(kind, offered, same_process=same_process, same_machine=same_machine)[0]

    assert pick("auto", addresses, same_process=True, same_machine=True) == "local:x"
    assert pick("auto", addresses, same_process=False, same_machine=True) == "shm:x"
    assert pick("auto", addresses, same_process=False, same_machine=False) == "grpc:x"
    for kind in ("collective", "grpc"):
        assert pick(kind, addresses, same_process=True, same_machine=True) == f"{kind}:x"
    with pytest.raises(ChannelError, match=r"cluster\.channel is shm"):
        pick("shm", addresses, same_process=False, same_machine=False)
    with pytest.raises(ConfigError, match=r"cluster\.channel"):
        pick("pigeon", addresses, same_process=False, same_machine=False)


@pytest.mark.parametrize(
    ("kind", "gpu", "same_machine", "taken"),
    [
        ("auto", "card-a", True, "cuda"),
        ("auto", "card-b", True, "nccl"),
        ("auto", "card-b", False, "nccl"),
        ("auto", None, True, "shm"),
        ("auto", None, False, "grpc"),
        ("shm", "card-a", True, "cuda"),
        ("shm", "card-b", True, "shm"),
        ("collective", "card-a", True, "collective"),  # NCCL takes a GPU once
        ("auto", "pod-a", True, "shm"),  # also where each of two pods has a name for it
        ("collective", "card-b", False, "nccl"),
        ("collective", None, False, "collective"),
    ],
)
def test_rows_stay_on_gpus_where_they_can(kind: str, gpu: str | None, same_machine: bool, taken: str) -> None:
    addresses = {one: f"{one}:x" for one in ("shm", "collective", "grpc", "nccl")}
    addresses["cuda"] = "cuda:card-a/name"
    found, *_ = choose.ways(kind, addresses, gpu=gpu, same_process=False, same_machine=same_machine)
    assert found.partition(":")[0] == taken
    assert choose.taken("auto", addresses) == "cuda/nccl/shm/grpc"


class Unopened(PretendedMemory):
    def open(self, handle: bytes, capacity: int) -> DeviceSegment:
        raise ProtocolError("the peer's device memory cannot be opened: invalid device context")


class Unmade(PretendedMemory):
    def make(self, capacity: int) -> tuple[DeviceSegment, bytes]:
        raise ResourceError("no memory to share: operation not supported")


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (Unopened(), PretendedMemory()),
        (Unmade(), PretendedMemory()),
        (PretendedMemory(), Unopened()),
        (PretendedMemory(), Unmade()),
    ],
)
def test_a_gpu_whose_memory_cannot_be_shared_is_found_out_when_the_channel_opens(
    there: PretendedMemory, here: PretendedMemory
) -> None:
    server = cuda.CudaServer(lambda _: (), there, "here")
    with pytest.raises(ChannelError):
        cuda.open_channel(server.address, here, "here", timeout=30)
    server.close()
