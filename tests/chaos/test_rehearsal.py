"""`raymoe chaos` against a running server: no fault fails a request or changes an answer."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands.serve import running, save_model, tiny_model
from support.commands.streams import StreamLoad, greedy_requests

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]
SETTINGS = {
    "cluster.expert_hosts": 3,
    "cluster.replicas": 2,
    "cluster.dead_after": 1.0,
    "serving.replicas": 2,
}
FAULTS = ("--seed", "3", "--duration", "40", "--every", "4", "--kinds", "kill,stop,slow,drop")
FAULTS += ("--targets", "host,coordinator,trunk")


@pytest.mark.parametrize("channel", ["auto", "collective"])
def test_a_rehearsal_under_load(tmp_path: Path, channel: str) -> None:
    model = tiny_model()
    directory = save_model(model, tmp_path / "tiny")
    settings = {**SETTINGS, "cluster.channel": channel}
    options = [option for name, value in settings.items() for option in ("--set", f"{name}={value}")]
    requests = greedy_requests(8, 60)
    with running(model, directory, tmp_path / "serve.log", *options) as server:
        calm = asyncio.run(StreamLoad(server, requests).run())
        at = ("--coordinator", server.coordinator, "--address", server.ray)
        chaos = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "chaos", *FAULTS, *at, "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        gaps = []
        with chaos:
            while chaos.poll() is None:
                load = StreamLoad(server, requests)
                assert asyncio.run(load.run()) == calm
                gaps.append(load.gap)
            assert chaos.stdout is not None
            faults = json.loads(chaos.stdout.read())["faults"]
        assert chaos.returncode == 0
    done = [fault for fault in faults if not fault["how"].startswith("not done")]
    assert len(done) >= 3, faults
    for fault in faults:
        print(f"{fault['at']:6.2f} s  {fault['kind']} {fault['target']}: {fault['how']}")
    print(f"{len(gaps)} times {len(requests)} streams, longest gap {max(gaps):.2f} s")
