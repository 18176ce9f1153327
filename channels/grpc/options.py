"""Settings of every gRPC connection and server of a job."""

from __future__ import annotations

from typing import Final

from channels.framing.limits import MAX_MESSAGE

MAX_STREAMS: Final = 1024
"""Most streams of frames of a server at a time; one more is refused, instead of waiting without a sign."""

OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    # A peer whose machine is gone is detected by pings.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    # A peer that comes back is found soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Each channel has a connection of its own, so that lanes do not share flow control.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.so_reuseport", 0),
)

__all__ = ["MAX_STREAMS", "OPTIONS"]
