"""Trunk replicas are lost thirty times in a row: no request fails, no answer changes.

The figures that these tests print are in docs/operations.md.
"""

from __future__ import annotations

import signal

import pytest

from support.commands.losses import LossSeries, trunks

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600), pytest.mark.shares("two replicas")]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_trunk_replicas_are_lost_in_a_row(losses: LossSeries, machine: str, how: signal.Signals) -> None:
    # Serve itself ends a stopped one after half a minute, for which the test does not wait.
    gaps = losses.lose(lambda: trunks(losses.server), how, kill=True)
    print(f"{how.name} to a trunk replica, {machine}, {gaps}")
