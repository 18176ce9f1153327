"""Changes of the number of hosts while another one is under way."""

from __future__ import annotations

import pytest

from cluster.membership import Orders, Stage
from errors import ResourceError
from support.memberships import info, membership, settle, stages


def test_no_drain_during_another_change() -> None:
    made = membership(2)
    made.scale(3, 1.0)
    with pytest.raises(ResourceError, match="the change to 3 expert hosts is under way"):
        made.drain("host-0", 2.0)
    assert stages(made) == {"host-0": Stage.SERVING, "host-1": Stage.SERVING}
    assert made.wanted == 3


def test_a_scale_takes_the_place_of_one_that_waits() -> None:
    made = membership(2)
    first = made.scale(6, 1.0)
    made.register(info(2), 2.0)
    assert made.scale(6, 2.0) is first, "the same again is the same change"
    second = made.scale(3, 3.0)
    assert first.failure == "the change to 3 expert hosts takes its place"
    assert first.ended == 3.0
    assert (second.before, second.target, made.wanted) == (2, 3, 3)
    assert made.orders(3, 3.0) == Orders(start=0, stop=(), cancel=3), "three wait for room still"
    settle(made, 4.0)
    assert second.ended == 4.0
    assert set(made.members) == {"host-0", "host-1", "host-2"}


def test_a_scale_back_to_what_there_is_is_done_at_once() -> None:
    made = membership(2)
    made.scale(6, 1.0)
    back = made.scale(2, 2.0)
    assert made.orders(4, 2.0).cancel == 4
    settle(made, 2.0)
    assert back.ended == 2.0


def test_hosts_that_were_to_go_stay_when_they_are_wanted_again() -> None:
    made = membership(4)
    made.scale(1, 1.0)
    again = made.scale(3, 2.0)
    assert [site.id for site in made.sites()] == ["host-0", "host-1", "host-2"]
    assert made.orders(0, 2.0) == Orders(start=0, stop=())
    settle(made, 3.0)
    assert again.ended == 3.0
    assert stages(made) == dict.fromkeys(("host-0", "host-1", "host-2"), Stage.SERVING)


def test_a_drained_host_goes_though_a_scale_takes_the_drains_place() -> None:
    made = membership(3)
    made.drain("host-0", 1.0)
    made.scale(3, 2.0)
    assert [site.id for site in made.sites()] == ["host-1", "host-2", "host-0"], "until another one is there"
    assert made.orders(0, 2.0).start == 1
    made.register(info(3), 3.0)
    settle(made, 4.0)
    assert set(made.members) == {"host-1", "host-2", "host-3"}


def test_a_request_does_not_wait_for_starts_that_failed_before() -> None:
    made = membership(1)
    made.scale(2, 1.0)
    made.start_failed("host-1", "no CPUs", 2.0)
    made.scale(2, 2.1)
    assert made.orders(0, 2.1).start == 1


def test_the_last_of_two_scales_after_a_drain_is_given_up_as_any_other() -> None:
    made = membership(3)
    made.drain("host-0", 1.0)
    made.scale(6, 2.0)
    last = made.scale(5, 3.0)
    made.start_failed("host-9", "no CPUs", 4.0)
    assert last.failure == "expert host host-9 did not start: no CPUs"
    assert made.wanted == 2, "the three hosts of the beginning without the drained one"
    settle(made, 5.0)
    assert stages(made) == dict.fromkeys(("host-1", "host-2"), Stage.SERVING)
