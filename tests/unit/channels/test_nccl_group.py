"""The options of NCCL's process group, without a GPU; test_channels.py tests the channel over it."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from channels.collective import nccl


class Work:
    """Work that reports completion, as NCCL does for failed work as well."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        raise RuntimeError("NCCL communicator was aborted")


class FakeProcessGroup:
    Options = SimpleNamespace

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        self.blocking = os.environ.get("TORCH_NCCL_BLOCKING_WAIT")

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        return Work()

    def abort(self) -> None: ...


@pytest.mark.parametrize("before", [None, "0"])
def test_a_failed_receive_is_an_error_and_the_variable_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT", raising=False)
    if before is not None:
        monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", before)
    monkeypatch.setattr(
        nccl, "_dist", SimpleNamespace(ProcessGroupNCCL=FakeProcessGroup, PrefixStore=lambda *_: None)
    )
    meeting: Any = None
    made = nccl.NcclGroup(meeting, 0, "there", "127.0.0.1", 1.0, device=torch.device("cuda", 0))
    assert made._group.blocking == "1"
    assert os.environ.get("TORCH_NCCL_BLOCKING_WAIT") == before
    with pytest.raises(RuntimeError, match="aborted"):
        made.receive(torch.zeros(1), 1.0, lambda: False)
