"""Every rule of `cluster.membership`, with a clock that the tests set."""

from __future__ import annotations

import pytest

from cluster.membership import Membership, Orders, Stage
from errors import ConfigError, ProtocolError, ResourceError
from support.memberships import info, kinds, membership, settle, stages


def test_a_host_that_registers_is_placed_and_serves() -> None:
    made = Membership(wanted=2, most=8)
    made.register(info(0), 1.0)
    made.register(info(0), 2.0)
    assert stages(made) == {"host-0": Stage.JOINING}
    assert made.members["host-0"].seen == 2.0
    assert [site.id for site in made.sites()] == ["host-0"]
    settle(made, 3.0)
    assert stages(made) == {"host-0": Stage.SERVING}
    assert kinds(made) == ["joined"]


def test_orders_say_what_is_missing_beside_what_is_on_its_way() -> None:
    made = membership(2, wanted=5)
    assert made.orders(0, 1.0) == Orders(start=3, stop=())
    assert made.orders(2, 1.0) == Orders(start=1, stop=())
    assert made.orders(2, 1.0) == Orders(start=1, stop=()), "asked again, the answer is the same"
    assert made.orders(4, 1.0) == Orders(start=0, stop=(), cancel=1)


def test_a_lost_host_is_stopped_and_replaced_and_its_name_not_used_again() -> None:
    made = membership(2)
    assert made.lose("host-1", "silent", 1.0)
    assert not made.lose("host-1", "silent", 1.0)
    assert made.orders(0, 1.0) == Orders(start=1, stop=("host-1",))
    with pytest.raises(ProtocolError, match=r"host-1 was taken out \(silent\); names are not used again"):
        made.register(info(1), 2.0)
    made.stopped(["host-1"])
    assert made.orders(1, 2.0) == Orders(start=0, stop=())
    with pytest.raises(ProtocolError, match="it had left"):
        made.register(info(1), 2.0)


def test_silence_counts_from_the_last_answer() -> None:
    made = membership(2)
    made.saw("host-1", 4.0)
    made.saw("host-9", 4.0)
    assert made.silent(5.0, 2.0) == ["host-0"]
    assert made.silent(1.0, 2.0) == []


def test_scaling_up_ends_when_all_hold_experts() -> None:
    made = membership(2)
    scaling = made.scale(4, 1.0)
    assert made.orders(0, 1.0).start == 2
    made.register(info(2), 2.0)
    settle(made, 2.0)
    assert scaling.ended is None
    made.register(info(3), 3.0)
    assert scaling.ended is None
    settle(made, 3.5)
    assert scaling.ended == 3.5
    assert "reached 4 expert hosts after 2.50 s" in made.events[-1].text


def test_scaling_down_lets_the_newest_go_once_their_experts_are_elsewhere() -> None:
    made = membership(4)
    scaling = made.scale(2, 1.0)
    assert [site.id for site in made.sites()] == ["host-0", "host-1"]
    assert made.orders(0, 1.0) == Orders(start=0, stop=()), "they hold experts still"
    made.placed(["host-0", "host-1", "host-2", "host-3"], 1.5)
    assert len(made.members) == 4
    settle(made, 2.0)
    assert set(made.members) == {"host-0", "host-1"}
    assert set(made.orders(0, 2.0).stop) == {"host-2", "host-3"}
    assert scaling.ended == 2.0
    assert kinds(made).count("left") == 2


def test_scaling_to_what_there_is_is_done_at_once() -> None:
    made = membership(2)
    scaling = made.scale(2, 1.0)
    settle(made, 1.0)
    assert scaling.ended == 1.0


@pytest.mark.parametrize("target", [0, -1, 9])
def test_numbers_that_cannot_be_are_refused(target: int) -> None:
    made = membership(2)
    with pytest.raises(ConfigError, match="it takes 1 to 8"):
        made.scale(target, 1.0)
    assert (made.wanted, made.scaling) == (2, None)


def test_what_the_cluster_lacks_is_an_event_once() -> None:
    made = membership(1)
    made.scale(3, 1.0)
    for at in (2.0, 3.0):
        made.orders(2, at, lacking="no CPUs")
    assert [event.text for event in made.events if event.kind == "waiting"] == ["no CPUs"]
    assert made.lacking == "no CPUs"
    made.orders(0, 4.0)
    assert made.lacking == ""


def test_events_are_numbered_though_only_the_latest_are_kept() -> None:
    made = Membership(wanted=1, most=8)
    for at in range(300):
        made.note(float(at), "moved", str(at))
    assert made.events.recorded == 300
    assert [event.text for event in made.events.after(298)] == ["298", "299"]
    assert len(made.events.after(0)) == 256
    assert made.events.after(300) == []


def test_a_start_that_fails_takes_the_scale_back_and_does_not_block_the_next() -> None:
    made = membership(2)
    scaling = made.scale(4, 1.0)
    made.register(info(2), 2.0)
    made.start_failed("host-3", "no CPUs", 3.0)
    assert scaling.failure == "expert host host-3 did not start: no CPUs"
    assert made.wanted == 2
    assert stages(made)["host-2"] is Stage.LEAVING
    assert [site.id for site in made.sites()] == ["host-0", "host-1"]
    again = made.scale(3, 3.5)
    assert (again.before, again.target) == (2, 3)


def test_what_was_given_up_ends_when_the_hosts_are_as_before() -> None:
    made = membership(2)
    scaling = made.scale(4, 1.0)
    made.register(info(2), 2.0)
    settle(made, 2.0)  # it holds experts already
    made.start_failed("host-3", "no CPUs", 3.0)
    assert scaling.ended is None
    settle(made, 4.0)
    assert set(made.members) == {"host-0", "host-1"}
    assert scaling.ended == 4.0
    assert made.events[-1].kind == "failed"


def test_a_host_that_dies_while_joining_takes_the_scale_back() -> None:
    made = membership(1)
    scaling = made.scale(2, 1.0)
    made.register(info(1), 2.0)
    made.lose("host-1", "its process ended", 3.0)
    assert scaling.failure == "expert host host-1 died while joining: its process ended"
    assert scaling.ended == 3.0
    assert made.wanted == 1
    assert made.orders(0, 3.0) == Orders(start=0, stop=("host-1",))


def test_a_serving_host_that_dies_does_not_end_a_scale() -> None:
    made = membership(2)
    scaling = made.scale(3, 1.0)
    made.lose("host-0", "its process ended", 2.0)
    assert (scaling.failure, made.wanted) == (None, 3)
    assert made.orders(1, 2.0).start == 1
    made.register(info(2), 3.0)
    made.register(info(3), 3.0)
    settle(made, 4.0)
    assert scaling.ended == 4.0


def test_a_host_that_comes_too_late_goes_again_without_experts() -> None:
    made = membership(2)
    made.scale(3, 1.0)
    made.start_failed("host-2", "no CPUs", 2.0)
    made.register(info(3), 3.0)
    assert [site.id for site in made.sites()] == ["host-0", "host-1"]
    settle(made, 3.0)
    assert made.orders(0, 3.0).stop == ("host-3",)


def test_starts_that_fail_are_tried_less_and_less_often() -> None:
    made = membership(1, wanted=2)
    now, waits = 1.0, []
    for at in range(1, 9):
        made.start_failed(f"host-{at}", "no CPUs", now)
        assert made.orders(0, now).start == 0
        wait = next(w for w in (1.0, 2.0, 4.0, 8.0, 16.0, 30.0) if made.orders(0, now + w).start)
        waits.append(wait)
        now += wait
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    made.register(info(9), now)
    assert made.orders(0, now).start == 0
    made.lose("host-9", "out of memory", now)  # it has registered, not worked
    assert made.orders(0, now + 29.0).start == 0
    made.register(info(10), now + 30.0)
    settle(made, now + 30.0)
    made.lose("host-10", "its process ended", now + 40.0)
    assert made.orders(0, now + 40.0).start == 1


def test_a_drained_host_goes_and_one_less_is_wanted() -> None:
    made = membership(3)
    scaling = made.drain("host-0", 1.0)
    assert made.wanted == 2
    assert [site.id for site in made.sites()] == ["host-1", "host-2"]
    settle(made, 2.0)
    assert made.orders(0, 2.0) == Orders(start=0, stop=("host-0",))
    assert scaling.ended == 2.0


def test_a_drained_host_stays_until_the_one_in_its_place_is_there() -> None:
    made = membership(2)
    scaling = made.drain("host-0", 1.0, replace=True)
    assert made.events[-1].text == "expert host host-0, for another one in its place"
    assert "scaling" not in kinds(made), "the number of hosts stays the same"
    assert made.orders(0, 1.0).start == 1
    assert {site.id for site in made.sites()} == {"host-0", "host-1"}
    settle(made, 1.5)
    assert "host-0" in made.members
    made.register(info(2), 2.0)
    assert [site.id for site in made.sites()] == ["host-1", "host-2"]
    settle(made, 3.0)
    assert scaling.ended == 3.0
    assert set(made.members) == {"host-1", "host-2"}


def test_a_drained_host_stays_for_good_when_none_comes_in_its_place() -> None:
    made = membership(1)
    scaling = made.drain("host-0", 1.0, replace=True)
    made.start_failed("host-1", "no CPUs", 2.0)
    assert scaling.failure is not None
    assert stages(made) == {"host-0": Stage.SERVING}
    assert made.wanted == 1
    settle(made, 2.0)
    assert made.orders(0, 20.0) == Orders(start=0, stop=())
    made.scale(2, 3.0)


def test_who_cannot_be_drained() -> None:
    made = membership(1)
    with pytest.raises(ConfigError, match="no expert host is host-7; these are there: host-0"):
        made.drain("host-7", 1.0)
    with pytest.raises(ConfigError, match="host-0 is the only one"):
        made.drain("host-0", 1.0)
    with pytest.raises(ConfigError, match="no expert host is host-0; these are there: none"):
        Membership(wanted=1, most=4).drain("host-0", 1.0)
    assert stages(made) == {"host-0": Stage.SERVING}


def test_a_refused_drain_leaves_a_joining_host_joining() -> None:
    made = membership(2)
    made.scale(3, 1.0)
    made.register(info(2), 2.0)
    with pytest.raises(ResourceError):
        made.drain("host-2", 2.0)
    assert stages(made)["host-2"] is Stage.JOINING


def test_a_retired_host_that_ends_before_it_is_stopped_is_no_failure() -> None:
    made = membership(2)
    made.scale(1, 1.0)
    settle(made, 2.0)
    before = kinds(made)
    made.start_failed("host-1", "its process ended", 3.0)
    assert kinds(made) == before
    assert made.orders(0, 3.0).start == 0


def test_hosts_that_were_to_go_under_a_membership_before_go() -> None:
    made = Membership(wanted=1, most=8, retiring=frozenset({"host-0"}))
    made.register(info(0), 0.0)
    made.register(info(1), 0.0)
    assert stages(made) == {"host-0": Stage.LEAVING, "host-1": Stage.JOINING}
    assert [site.id for site in made.sites()] == ["host-1"]


def test_only_so_many_events_are_kept() -> None:
    made = Membership(wanted=1, most=8)
    for at in range(1000):
        made.note(float(at), "moved", str(at))
    assert len(made.events) == 256
    assert made.events[-1].text == "999"
