"""Copies of a trunk that go to hosts: which errors they forgive, and which end the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from actors.messages.transfer_orders import Blob, StoredCopy
from actors.trunk.snapshots import TrunkSnapshots
from cluster.topology import HostInfo
from errors import ChannelError, ConfigError, ResourceError

HOSTS = [HostInfo(id=f"host-{at}", node="node") for at in range(2)]


class OneTensor:
    """Trunk parameters of one tensor, as far as snapshots use them."""

    part = "trunk"

    def state(self) -> Mapping[str, Tensor]:
        return {"weight": torch.ones(2)}


class FailingStore:
    """A host's snapshot store that raises an error at every put."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def put(self, blob: Blob) -> None:
        raise self.error

    def get(self, name: str, step: int) -> Blob:
        raise self.error

    def inventory(self) -> Sequence[StoredCopy]:
        return []

    def close(self) -> None: ...


def test_an_unexpected_error_of_a_copy_ends_the_run_at_the_next_snapshot() -> None:
    snapshots = TrunkSnapshots(OneTensor(), lambda host: FailingStore(KeyError("weight")))  # type: ignore[arg-type]
    snapshots.keep(1, HOSTS)
    with pytest.raises(KeyError, match="weight"):
        snapshots.keep(2, HOSTS)
    snapshots.close()


def test_an_unexpected_error_of_the_last_copy_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    snapshots = TrunkSnapshots(OneTensor(), lambda host: FailingStore(KeyError("weight")))  # type: ignore[arg-type]
    snapshots.keep(1, HOSTS)
    snapshots._storing.exception(20)  # type: ignore[union-attr]
    snapshots.close()
    assert "was not stored with hosts" in caplog.text and "KeyError" in caplog.text


@pytest.mark.parametrize("error", [ChannelError("gone"), ResourceError("full")])
@pytest.mark.parametrize("at_connecting", [False, True])
def test_hosts_that_are_gone_or_full_are_left_out(error: Exception, at_connecting: bool) -> None:
    def reach(host: HostInfo) -> FailingStore:
        if at_connecting:
            raise ConfigError("no certificate")
        return FailingStore(error)

    snapshots = TrunkSnapshots(OneTensor(), reach)  # type: ignore[arg-type]
    for step in range(1, 4):
        snapshots.keep(step, HOSTS)
    snapshots.close()
