"""A real HAProxy ends with the process that owns it, and not with a thread of that process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.serving.front.haproxy_process import HaproxyProcess, haproxy_binary
from support.fronted_app import Fronted, free_port, request
from support.waiting import wait_until

pytestmark = pytest.mark.timeout(60)

_OWNER = """
import sys
import threading
from pathlib import Path

from jobs.serving.front.haproxy_config import FrontPlan
from jobs.serving.front.haproxy_process import HaproxyProcess, haproxy_binary
from jobs.serving.front_config import FrontConfig

plan = FrontPlan(
    host="127.0.0.1", port=int(sys.argv[1]), http="127.0.0.1:9", folder=Path(sys.argv[2]),
    limits=FrontConfig(), largest_body=1 << 20, needs_key=False, token="token",
)
process = HaproxyProcess(plan, haproxy_binary())
starter = threading.Thread(target=process.start, args=((),))
starter.start()
starter.join()
print(process.pid, flush=True)
threading.Event().wait()
"""


def runs(pid: int) -> bool:
    """Whether a process exists and is not only waiting for its parent to read its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_it_outlives_the_thread_that_starts_it(tmp_path: Path, open_front: Fronted) -> None:
    binary = haproxy_binary()
    assert binary is not None
    plan = replace(open_front.plan, folder=tmp_path, port=free_port())
    process = HaproxyProcess(plan, binary)
    starter = threading.Thread(target=process.start, args=((),))
    try:
        starter.start()
        thread = starter.native_id
        starter.join()
        # The kernel has told the children of a thread of its end before the thread disappears.
        wait_until(lambda: not Path(f"/proc/self/task/{thread}").exists(), seconds=20)
        assert replace(open_front, plan=plan, process=process).status(request()) == 200
        assert process.pid is not None
    finally:
        process.kill()
    assert process.pid is None


def test_it_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(free_port()), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    with owner:
        try:
            assert owner.stdout is not None
            pid = int(owner.stdout.readline())
            assert runs(pid)
        finally:
            os.kill(owner.pid, signal.SIGKILL)
        wait_until(lambda: not runs(pid), seconds=20)
