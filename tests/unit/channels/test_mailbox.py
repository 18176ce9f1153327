"""Calls of few rows through mailboxes: the same sums, and the fallback to channels."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from actors.router.lane import Lane
from actors.router.mailbox_call import MailboxCall
from channels.base import Channel
from channels.shm import channel as shm
from channels.shm.channel import ShmServer
from channels.shm.mailbox import HostMailbox, ShmMailbox, size_of
from cluster.topology import HostInfo
from errors import ChannelError, ChannelTimeout, ProtocolError, RaymoeError
from kernels import mailbox as words_of
from support.tiny_cluster import CONFIG, LAYERS, TinyCluster, local_experts, tokens

FLOAT64 = np.dtype(np.float64)


class Mailed(TinyCluster):
    """Hosts that look into mailboxes; `mailed` counts the calls that went through them."""

    def __init__(self, n_hosts: int) -> None:
        super().__init__(n_hosts, train=False)
        self.doors: list[ShmServer] = [shm.serve(host.handle, host.answer) for host in self.hosts]
        self.infos = tuple(
            HostInfo(id=host.id, addresses={"shm": door.address})
            for host, door in zip(self.hosts, self.doors, strict=True)
        )
        self.router.set_table(self.table(0))
        self.mailed = 0

    def connect(self, host: HostInfo) -> Channel:
        return shm.connect(host.addresses["shm"])

    def ready_lane(self) -> Lane:
        """A lane whose mailboxes the hosts poll."""
        lane = self.lane()
        rows, idx, gates = tokens(1)
        deadline = time.monotonic() + 30
        while not self.mailed:
            lane.dispatch(LAYERS[0], rows, idx, gates).combine()
            assert time.monotonic() < deadline
        return lane


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Mailed]:
    cluster = Mailed(getattr(request, "param", 2))
    add = MailboxCall.add_to

    def counted(call: MailboxCall, out: Any) -> None:
        cluster.mailed += 1
        add(call, out)

    monkeypatch.setattr(MailboxCall, "add_to", counted)
    yield cluster
    cluster.router.close()
    for door in cluster.doors:
        door.close()


@pytest.mark.parametrize("cluster", [1, 2, 4], indirect=True)
def test_sums_are_those_of_the_model(cluster: Mailed) -> None:
    lane, experts = cluster.ready_lane(), local_experts()
    with torch.no_grad():
        for n in (1, 2, 7, 16, 17, 40):
            before = cluster.mailed
            for layer in LAYERS:
                rows, idx, gates = tokens(n, seed=n)
                pending = lane.dispatch(layer, rows, idx, gates)
                expected = experts.dispatch(layer, rows, idx, gates).combine()
                torch.testing.assert_close(pending.combine(), expected, rtol=1e-12, atol=1e-12)
            assert cluster.mailed - before == (len(LAYERS) if n <= 16 else 0)


def test_counters_tell_of_mail_too(cluster: Mailed) -> None:
    lane = cluster.ready_lane()
    before = lane.counters.tokens, lane.counters.rows
    rows, idx, gates = tokens(3)
    lane.dispatch(LAYERS[0], rows, idx, gates).combine()
    assert lane.counters.tokens - before[0] == 3
    holders = np.array(cluster.holders[0])[:, 0]
    assert lane.counters.rows - before[1] == sum(len(set(holders[chosen])) for chosen in idx.tolist())


def test_a_host_that_sleeps_is_woken(cluster: Mailed) -> None:
    lane = cluster.ready_lane()
    rows, idx, gates = tokens(2)
    expected = lane.dispatch(LAYERS[0], rows, idx, gates).combine()
    boxes = lane._mailboxes.for_call(cluster.router.routing.host_map, rows.numpy(), idx.numpy())
    assert boxes is not None
    for _ in range(20):
        deadline = time.monotonic() + 30
        while not all(box._box.words[words_of.ASLEEP] for box in boxes):
            assert time.monotonic() < deadline
        assert torch.equal(lane.dispatch(LAYERS[0], rows, idx, gates).combine(), expected)


def test_a_stale_epoch_goes_again_with_the_new_table(cluster: Mailed) -> None:
    lane = cluster.ready_lane()
    rows, idx, gates = tokens(2)
    expected = lane.dispatch(LAYERS[0], rows, idx, gates).combine()
    for host in cluster.hosts:
        host.epoch = 5
    mailed = cluster.mailed
    assert torch.equal(lane.dispatch(LAYERS[0], rows, idx, gates).combine(), expected)
    assert cluster.router.routing.host_map.epoch == 5
    assert torch.equal(lane.dispatch(LAYERS[0], rows, idx, gates).combine(), expected)
    assert cluster.mailed == mailed + 2


def test_a_refusal_tells_why(cluster: Mailed) -> None:
    lane = cluster.ready_lane()
    rows, idx, gates = tokens(1)
    cluster.router.routing.host_map._host_of[LAYERS[0]].fill_(0)
    idx[:] = torch.tensor([0, 1, CONFIG.n_routed_experts - 1])
    with pytest.raises(RaymoeError, match=r"host-0.*does not hold experts \[7\]"):
        lane.dispatch(LAYERS[0], rows, idx, gates).combine()


def test_a_host_that_goes_is_named_and_others_are_read(cluster: Mailed) -> None:
    lane = cluster.ready_lane()
    cluster.doors[1].close()
    rows, idx, gates = tokens(8)
    with pytest.raises(ChannelError, match="host-1"):
        lane.dispatch(LAYERS[0], rows, idx, gates).combine()
    with pytest.raises(ChannelError, match="host-1"):
        lane.dispatch(LAYERS[0], rows, idx, gates).combine()
    lane.abandon()


def test_a_host_ends_though_mail_keeps_coming(cluster: Mailed, monkeypatch: pytest.MonkeyPatch) -> None:
    lane = cluster.ready_lane()
    rows, idx, gates = tokens(8)
    errors: list[RaymoeError] = []

    def keep_asking() -> None:
        try:
            while True:
                lane.dispatch(LAYERS[0], rows, idx, gates).combine()
        except RaymoeError as error:
            errors.append(error)

    client = threading.Thread(target=keep_asking, daemon=True)
    client.start()
    mailed, deadline = cluster.mailed, time.monotonic() + 30
    while cluster.mailed < mailed + 10:
        assert time.monotonic() < deadline
    host = threading.Thread(target=cluster.doors[0].close, daemon=True)
    with monkeypatch.context() as patched:
        patched.setattr(shm, "_RESTLESS", 3600.0)  # however slow this machine is, there is always mail
        host.start()
        host.join(10)
        assert not host.is_alive()
    client.join(10)
    assert "host-0" in str(errors[0])
    lane.abandon()


def test_a_host_that_is_gone_matters_only_to_calls_that_want_it(cluster: Mailed) -> None:
    cluster.doors[1].close()
    lane = cluster.lane()
    rows, idx, gates = tokens(1)
    holders = torch.tensor(cluster.holders[0])[:, 0]
    idx[:] = torch.nonzero(holders == 0).flatten()[: idx.shape[1]]
    with torch.no_grad():
        expected = local_experts().dispatch(LAYERS[0], rows, idx, gates).combine()
    for _ in range(3):
        torch.testing.assert_close(lane.dispatch(LAYERS[0], rows, idx, gates).combine(), expected)
    idx[0, 0] = int(torch.nonzero(holders == 1)[0])
    with pytest.raises(ChannelError, match="host-1"):
        lane.dispatch(LAYERS[0], rows, idx, gates).combine()


def test_what_is_abandoned_is_not_mistaken_for_what_follows(cluster: Mailed) -> None:
    lane = cluster.ready_lane()
    rows, idx, gates = tokens(4)
    expected = lane.dispatch(LAYERS[0], rows, idx, gates).combine()
    lane.dispatch(LAYERS[0], 3 * rows, idx, gates)
    lane.begin(1, 0)
    assert torch.equal(lane.dispatch(LAYERS[0], rows, idx, gates).combine(), expected)


def pair(width: int = 4, pairs: int = 8) -> tuple[ShmMailbox, HostMailbox, np.ndarray]:
    memory = np.zeros(size_of(width, pairs, FLOAT64), np.uint8)
    mailbox = ShmMailbox(memory, width, pairs, FLOAT64, wake=lambda: None, alive=lambda: None)
    return mailbox, HostMailbox(memory), memory


def posted(mailbox: ShmMailbox) -> None:
    idx, gates = np.array([[0, 2]]), np.ones((1, 2))
    assert mailbox.post(np.ones((1, 4)), idx, gates, np.zeros((1, 3), np.int64), 0, (3, 0, 1)) == 1


def test_no_reply_in_time() -> None:
    mailbox, _, _ = pair()
    posted(mailbox)
    with pytest.raises(ChannelTimeout):
        mailbox.collect(np.zeros((1, 4)), timeout=0.05)


def test_a_late_reply_is_none_to_the_next_request() -> None:
    mailbox, host, _ = pair()
    local_of = np.array([0, -1, 1], np.int32)
    posted(mailbox)
    assert host.watch(0) == words_of.MAIL
    assert host.accept(local_of) == (1, 2)
    posted(mailbox)  # the first one was given up while the host computes it
    host.reply(answered=True)
    with pytest.raises(ChannelTimeout):
        mailbox.collect(np.zeros((1, 4)), timeout=0.05)
    assert host.watch(0) == words_of.MAIL
    host.reply(answered=True)
    assert mailbox.collect(np.zeros((1, 4)), timeout=None)
    assert host.watch(0) == words_of.NOTHING


def test_a_call_that_cannot_be_sent_to_all_leaves_no_box_pending(
    cluster: Mailed, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = cluster.ready_lane()
    rows, idx, gates = tokens(8)
    expected = lane.dispatch(LAYERS[0], rows, idx, gates).combine()
    boxes = lane._mailboxes._ready
    assert boxes is not None
    first, second = boxes[1]

    def fails(*_: object) -> int:
        raise ChannelError("hung up")

    monkeypatch.setattr(second, "post", fails)
    with pytest.raises(ChannelError, match="host-1"):
        lane.dispatch(LAYERS[0], rows, idx, gates)
    words = first._box.words
    assert words[words_of.REPLY] == words[words_of.REQUEST]
    assert torch.equal(lane.dispatch(LAYERS[0], rows, idx, gates).combine(), expected)


@pytest.mark.parametrize(
    ("part", "at", "value"),
    [
        ("words", words_of.ROWS, 17),
        ("words", words_of.ROWS, -1),
        ("words", words_of.PAIRS, 1 << 40),
        ("words", words_of.PAIRS, 1),
        ("row_ptr", 1, -3),
        ("row_ptr", 1, 1 << 30),
        ("expert", 0, -1),
        ("expert", 1, 1 << 30),
        ("expert", 0, 1),  # of another host
    ],
)
def test_a_box_that_lies_is_refused(part: str, at: int, value: int) -> None:
    mailbox, host, _ = pair()
    posted(mailbox)
    local_of = np.array([0, -1, 1], np.int32)
    assert host.watch(0) == words_of.MAIL
    assert host.call == (3, 1)
    assert host.accept(local_of) == (1, 2)
    getattr(mailbox._box, part)[at] = value
    assert host.accept(local_of) == (0, 0)
    host.reply(answered=False)
    assert not mailbox.collect(np.zeros((1, 4)), timeout=None)


@pytest.mark.parametrize(
    ("word", "value"), [(48, 0), (48, -4), (48, 1 << 60), (49, 0), (49, 1 << 40), (50, 3), (50, 0)]
)
def test_a_box_of_an_absurd_shape_is_none(word: int, value: int) -> None:
    _, _, memory = pair()
    memory.view(np.int64)[word] = value
    with pytest.raises(ProtocolError, match="mailbox"):
        HostMailbox(memory)
    with pytest.raises(ProtocolError, match="mailbox"):
        HostMailbox(memory[:100])
