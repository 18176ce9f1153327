"""Names of this process and this machine, equal where they are shared."""

from __future__ import annotations

import hashlib
import os
import socket
from functools import cache
from pathlib import Path


@cache
def machine_id() -> str:
    """The machine's name, equal for two processes that can reach each other's abstract sockets.

    Made of the kernel's boot id and the network namespace: two containers of one machine share the first and
    not the second. On a system with neither, it is made of the host's name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/net").st_ino
    except OSError:
        boot, namespace = socket.gethostname(), 0
    return hashlib.blake2s(f"{boot}/{namespace}".encode(), digest_size=8).hexdigest()


def process_id() -> str:
    """The process's name; holds the start time too, as a pid may come back after a restart."""
    pid = os.getpid()  # not cached: a fork is another process
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        started = "0"
    return f"{machine_id()}-{pid}-{started}"


__all__ = ["machine_id", "process_id"]
