"""Handles of device memory on the wire, whole and broken."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch

from channels.cuda.cuda_memory import CudaMemory, packed, unpacked
from errors import ProtocolError


@pytest.mark.parametrize("values", [[], [1, -5, True, False, b"", b"handle" * 20], [b"x" * 60000]])
def test_handles_of_device_memory_come_back(values: list[Any]) -> None:
    assert unpacked(packed(values)) == values


@pytest.mark.parametrize("bytes_of_them", [b"\x00", b"\x00\x05\x00abc", b"\x01\x00", b"\x07", b"\x02"])
def test_handles_that_lie(bytes_of_them: bytes) -> None:
    with pytest.raises(ProtocolError, match="cannot be opened"):
        CudaMemory(torch.device("cuda", 0)).open(bytes_of_them, 1 << 16)
    with pytest.raises((ValueError, struct.error)):
        unpacked(bytes_of_them)
