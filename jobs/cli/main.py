"""Entry point of the `raymoe` script. The commands are imported once Ctrl-C is handled."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

_INTERRUPTED = 130  # exit code after Ctrl-C, by convention of shells


def main() -> None:
    """Entry point of the `raymoe` script."""
    try:
        if "--debug" not in sys.argv:
            # Otherwise gRPC's C library writes lines about closed connections to stderr.
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # it may be ignored
        if handled:
            signal.signal(signal.SIGINT, _leave)
        from jobs.cli.app import app

        if handled:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def _leave(number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    """End the process after Ctrl-C.

    An exception from a handler could be lost in a callback of the import system, and the command would go on.
    """
    os.write(2, b"interrupted\n")
    os._exit(_INTERRUPTED)


__all__ = ["main"]
