"""Measures the round trip of a dispatch and its combine over each kind of channel.

The server is a process with a host that returns the rows unchanged. gRPC is compared with a bare stream of
the same bytes with the same options, and the collective channel with gloo's own send and receive of the same
rows; shared memory is measured alone. Rounds alternate, so that other load on the machine affects both sides;
figures are medians.
"""

from __future__ import annotations

import multiprocessing
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch

from channels.base import Channel, Phase, Request, RequestId, Server
from channels.choose import connect
from errors import ConfigError

KINDS: Final = ("shm", "collective", "grpc")
WIDTH: Final = 256
SMALL, MEBIBYTE, LARGE = 1, 1024, 8192
"""Rows of 256 floats: one, 1 MiB, 8 MiB."""
_PATIENCE: Final = 60.0


def _rows_back(request: Request) -> tuple[torch.Tensor, ...]:
    return (request.tensors[0],)


def _gloo(meeting: str, rank: int) -> Any:
    """A bare process group of two, whose ends find each other by a file."""
    c10d: Any = torch.distributed
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=_PATIENCE)
    return c10d.ProcessGroupGloo(c10d.FileStore(meeting, 2), rank, 2, options)


def _echo_gloo(meeting: str, calls: int) -> None:
    group = _gloo(meeting, 1)
    rows = torch.empty(MEBIBYTE, WIDTH)
    for _ in range(calls):
        group.recv([rows], 0, 0).wait()
        group.send([rows], 0, 0).wait()


class _BareGloo:
    """The least there is: rows there and back."""

    def __init__(self, meeting: str) -> None:
        self._group = _gloo(meeting, 0)
        self._rows = torch.randn(MEBIBYTE, WIDTH)

    def call(self) -> None:
        sent = self._group.send([self._rows], 1, 0)
        back = torch.empty(MEBIBYTE, WIDTH)  # as the channel does, whose replies are the caller's
        self._group.recv([back], 1, 0).wait()
        sent.wait()


def _serve(addresses: Connection) -> None:
    """The server's process, with all kinds of channels; ends when the parent closes the pipe."""
    import grpc

    from channels.collective import channel as collective
    from channels.grpc import channel as grpc_channel
    from channels.shm import channel as shm

    torch.set_num_threads(1)

    def echo(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        return frames

    bare = grpc.server(ThreadPoolExecutor(4), options=grpc_channel.OPTIONS)
    handlers: Any = {"Exchange": grpc.stream_stream_rpc_method_handler(echo)}
    bare.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Stream", handlers),))
    port = bare.add_insecure_port("127.0.0.1:0")
    bare.start()
    servers: list[Server] = [
        shm.serve(_rows_back),
        collective.serve(_rows_back),
        grpc_channel.serve(_rows_back),
    ]
    addresses.send((*(server.address for server in servers), f"127.0.0.1:{port}"))
    echo_gloo = threading.Thread(target=_echo_gloo, args=addresses.recv())
    echo_gloo.start()
    try:
        addresses.recv()
    except EOFError:
        pass
    finally:
        bare.stop(grace=None).wait()
        echo_gloo.join()
        for server in servers:
            server.close()


class _BareStream:
    """The least there is: bytes into a queue, bytes out of the stream."""

    def __init__(self, target: str) -> None:
        import grpc

        from channels.grpc.channel import OPTIONS

        self._channel = grpc.insecure_channel(target, options=OPTIONS)
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        exchange = self._channel.stream_stream("/bare.Stream/Exchange", None, None)
        self._replies: Any = exchange(iter(self._requests.get, None))

    def call(self, frame: bytes) -> bytes:
        self._requests.put(frame)
        reply: bytes = next(self._replies)
        return reply

    def close(self) -> None:
        self._requests.put(None)
        self._replies.cancel()
        self._channel.close()


def _request(n_rows: int) -> Request:
    """A request to a host: rows, and for each row one expert and its gate."""
    name = RequestId(
        run="bench", epoch=1, step=1, microbatch=0, layer=1, phase=Phase.INFER, router="router-0"
    )
    tensors = (
        torch.randn(n_rows, WIDTH),
        torch.arange(n_rows + 1, dtype=torch.int32),
        torch.zeros(n_rows, dtype=torch.int32),
        torch.ones(n_rows),
    )
    return Request(id=name, tensors=tensors)


def _seconds(call: Callable[[], object], repeats: int) -> list[float]:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def _alternate(calls: dict[str, Callable[[], object]], *, rounds: int, repeats: int) -> dict[str, float]:
    """Median seconds of each call, over rounds in which the calls alternate."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        _seconds(call, 3)  # memory is mapped, streams are open
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name] += _seconds(call, repeats)
    return {name: statistics.median(values) for name, values in taken.items()}


def _through(channel: Channel, n_rows: int) -> Callable[[], object]:
    request = _request(n_rows)
    return lambda: channel.submit(request).result(_PATIENCE)


def measure(*, rounds: int = 10, repeats: int = 40) -> dict[str, dict[str, float]]:
    """Measure all kinds of channels.

    Args:
        rounds: Number of rounds.
        repeats: Small calls per round; there are a tenth as many large ones.

    Returns:
        `shm.rtt_us` (1 row there and back, µs), `shm.gb_per_s` (8 MiB, both ways counted),
        `grpc.over_bare` (time over a bare stream's, the worse of 1 row and 1 MiB),
        `collective.of_bare` (speed in gloo's own, 1 MiB), and raw figures.
    """
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    opened: list[Channel | _BareStream] = []
    try:
        shm_address, collective_address, grpc_address, bare_target = ours.recv()
        few = max(repeats // 10, 1)
        meeting = tempfile.TemporaryDirectory(prefix="raymoe-bench-")
        ours.send((str(Path(meeting.name) / "meeting"), 3 + rounds * few))
        shm, grpc, bare = connect(shm_address), connect(grpc_address), _BareStream(bare_target)
        collective, gloo = connect(collective_address), _BareGloo(str(Path(meeting.name) / "meeting"))
        opened += [shm, grpc, bare, collective]
        row, block = bytes(WIDTH * 4), bytes(MEBIBYTE * WIDTH * 4)
        small = _alternate(
            {"grpc": _through(grpc, SMALL), "bare": lambda: bare.call(row)}, rounds=rounds, repeats=repeats
        )
        mebibyte = _alternate(
            {"grpc": _through(grpc, MEBIBYTE), "bare": lambda: bare.call(block)}, rounds=rounds, repeats=few
        )
        # Shared memory has no counterpart to alternate with; the calls of a layer follow one another too.
        small |= _alternate({"shm": _through(shm, SMALL)}, rounds=rounds, repeats=10 * repeats)
        mebibyte |= _alternate({"shm": _through(shm, MEBIBYTE)}, rounds=rounds, repeats=repeats)
        small |= _alternate({"collective": _through(collective, SMALL)}, rounds=rounds, repeats=repeats)
        mebibyte |= _alternate(
            {"collective": _through(collective, MEBIBYTE), "gloo": gloo.call}, rounds=rounds, repeats=few
        )
        large = _alternate({"shm": _through(shm, LARGE)}, rounds=rounds, repeats=few)
    finally:
        for end in opened:
            end.close()
        ours.close()
        process.join()
        meeting.cleanup()
    return _figures(small, mebibyte, large)


def _figures(
    small: dict[str, float], mebibyte: dict[str, float], large: dict[str, float]
) -> dict[str, dict[str, float]]:
    """The figures, from the median seconds of a call of each kind for each size of rows."""
    ratios = {"1 row": small["grpc"] / small["bare"], "1 MiB": mebibyte["grpc"] / mebibyte["bare"]}
    both_ways = 2 * LARGE * WIDTH * 4
    return {
        "shm": {
            "rtt_us": small["shm"] * 1e6,
            "gb_per_s": both_ways / large["shm"] / 1e9,
            "mebibyte_us": mebibyte["shm"] * 1e6,
        },
        "grpc": {
            "over_bare": max(ratios.values()),
            "over_bare_1_row": ratios["1 row"],
            "over_bare_1_mebibyte": ratios["1 MiB"],
            "rtt_us": small["grpc"] * 1e6,
            "mebibyte_us": mebibyte["grpc"] * 1e6,
        },
        "collective": {
            "of_bare": mebibyte["gloo"] / mebibyte["collective"],
            "rtt_us": small["collective"] * 1e6,
            "mebibyte_us": mebibyte["collective"] * 1e6,
        },
        "bare_gloo": {"mebibyte_us": mebibyte["gloo"] * 1e6},
        "bare_grpc": {"rtt_us": small["bare"] * 1e6, "mebibyte_us": mebibyte["bare"] * 1e6},
    }


def bench_channel(kinds: Sequence[str], *, rounds: int = 10) -> dict[str, Any]:
    """The figures of `measure` for some kinds (`shm`, `collective`, `grpc`).

    Raises:
        ConfigError: A kind is unknown.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"--kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
    figures = measure(rounds=rounds)
    return {kind: values for kind, values in figures.items() if any(name in kind for name in kinds)}


__all__ = ["bench_channel", "measure"]
