"""Channels drop replies after the host has done the work: training ends with equal weights."""

from __future__ import annotations

import argparse
import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from channels.base import Channel, Phase, Request, Ticket
from cluster.topology import HostInfo
from errors import ChannelError, RemoteError
from support.tiny_cluster import LAYERS, TinyCluster, tokens
from support.training_job import RunOutcome, difference, text_corpus, tiny, train

pytestmark = pytest.mark.slow

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")


class Faults:
    """Which replies are dropped: a share of them, drawn at random from a seed."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._random = random.Random(7)
        self._lock = threading.Lock()
        self.dropped: Counter[Phase] = Counter()

    def drops(self, phase: Phase) -> bool:
        with self._lock:
            if self._random.random() >= self._share:
                return False
            self.dropped[phase] += 1
            return True

    def wrap(self, channel: Channel) -> Channel:
        return Lossy(channel, self)


class Lossy:
    """A channel that closes in place of some replies."""

    def __init__(self, inner: Channel, faults: Faults) -> None:
        self._inner, self._faults = inner, faults

    def submit(self, request: Request) -> Ticket:
        return LossyTicket(self._inner, self._inner.submit(request), self._faults, request.id.phase)

    def takes(self, device: torch.device) -> bool:
        return self._inner.takes(device)

    def open_mailbox(self, width: int, pairs: int, dtype: np.dtype[Any]) -> None:
        return None

    def cut(self, why: str) -> None:
        self._inner.cut(why)

    def close(self) -> None:
        self._inner.close()


class LossyTicket:
    def __init__(self, channel: Channel, ticket: Ticket, faults: Faults, phase: Phase) -> None:
        self._channel, self._ticket, self._faults, self._phase = channel, ticket, faults, phase

    def result(self, timeout: float | None = None) -> tuple[Tensor, ...]:
        reply = self._ticket.result(timeout)
        if self._faults.drops(self._phase):
            self._channel.close()
            raise ChannelError("the reply was dropped")
        return reply


def run(output: Path, faults: Faults, channel: str, workers: int, in_flight: int) -> RunOutcome:
    config = tiny(
        training={
            "dtype": "float64",
            "steps": 12,
            "workers": workers,
            "microbatches_in_flight": in_flight,
            "eval_interval": 0,
            "tensorboard": False,
            "batch_size": 8,
        },
        checkpoint={"interval": 0},
        cluster={"expert_hosts": 2},
    )
    return train(config, text_corpus(config, TEXT), output, channel=channel, wrap=faults.wrap)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("channel", "workers", "in_flight"),
    [("local", 1, 1), ("shm", 1, 1), ("grpc", 1, 1), ("local", 2, 2), ("shm", 2, 2)],
)
def test_training_ends_the_same(tmp_path: Path, channel: str, workers: int, in_flight: int) -> None:
    torch.set_num_threads(1)
    faults = Faults(0.05)
    undisturbed = run(tmp_path / "one", Faults(0.0), channel, workers, in_flight)
    disturbed = run(tmp_path / "other", faults, channel, workers, in_flight)
    assert faults.dropped[Phase.FORWARD] > 3
    assert faults.dropped[Phase.BACKWARD] > 3
    assert len(undisturbed.losses) == 12
    bound = 0.0 if in_flight == workers == 1 else 1e-9  # gradients of lanes add up in any order
    assert max(difference(disturbed, undisturbed)) <= bound


@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.BACKWARD])
@pytest.mark.parametrize("drops", [3, 4])
def test_a_request_goes_three_times_again(phase: Phase, drops: int) -> None:
    cluster = TinyCluster(1)
    left, sent = drops, 0

    class Dropping(Faults):
        def drops(self, of: Phase) -> bool:
            nonlocal left
            if of is phase and left:
                left -= 1
                return True
            return False

    connect, faults = cluster.connect, Dropping(0.0)

    def counted(host: HostInfo) -> Channel:
        nonlocal sent
        sent += 1
        return faults.wrap(connect(host))

    cluster.connect = counted  # type: ignore[method-assign]
    rows, idx, gates = tokens(5, grad=True)

    def step() -> None:
        cluster.lane().dispatch(LAYERS[0], rows, idx, gates).combine().sum().backward()

    if drops == 3:
        step()
        assert sent == 4
        assert cluster.hosts[0].stats().requests["BACKWARD"] == 1
    else:
        with pytest.raises(ChannelError, match="the reply was dropped"):
            step()
        assert sent == 4
    assert not left


def test_an_answer_does_not_go_again() -> None:
    cluster = TinyCluster(1)
    rows, idx, gates = tokens(5, grad=True)
    with pytest.raises(RemoteError):
        cluster.lane(step=7).dispatch(LAYERS[0], rows, idx, gates).combine()
    assert sum(cluster.hosts[0].stats().requests.values()) == 0
