"""Segments of shared memory: without a name, used again, and given back once."""

from __future__ import annotations

import os

import pytest

from channels.shm.segments import SegmentMirror, shm_pool
from errors import ProtocolError


def test_payloads_lie_in_memory_without_a_name() -> None:
    _, _, descriptor = shm_pool().take(1 << 16)
    assert descriptor is not None
    assert os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:")
    assert os.fstat(descriptor).st_nlink == 0


def test_a_segment_given_back_twice_is_refused() -> None:
    pool = shm_pool()
    _, segment, descriptor = pool.take(10)
    assert descriptor is not None
    os.close(descriptor)
    pool.release(segment.index)
    with pytest.raises(ProtocolError, match="segment 0, which is not in use"):
        pool.release(segment.index)


def test_segments_are_used_again_and_follow_the_largest_payload() -> None:
    pool, mirror = shm_pool(), SegmentMirror()
    for size in (10, 70_000, 5000, 1 << 20, 1 << 20):
        _, segment, descriptor = pool.take(size)
        if descriptor is not None:
            mirror.attach(segment.index, descriptor, segment.capacity)
            os.close(descriptor)
        segment.memory[:size] = 7
        assert int(mirror.get(segment.index, size).memory[:size].sum()) == 7 * size
        assert segment.index == 0
        pool.release(0)
    assert pool.take(1 << 20)[2] is None
