"""Expert hosts are lost thirty times in a row: no request fails, no answer changes.

The figures that these tests print are in docs/operations.md.
"""

from __future__ import annotations

import signal

import pytest

from support.commands.losses import LossSeries
from support.commands.streams import HOST, actors

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600), pytest.mark.shares("two replicas")]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_expert_hosts_are_lost_in_a_row(losses: LossSeries, machine: str, how: signal.Signals) -> None:
    gaps = losses.lose(lambda: actors(losses.server, HOST), how)
    print(f"{how.name} to an expert host, {machine}, {gaps}")
