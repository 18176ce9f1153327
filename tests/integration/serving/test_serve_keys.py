"""API keys of `raymoe serve`: nothing that a running server writes, lists or passes on holds one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from protos.generation_pb2 import GenerateRequest
from protos.generation_pb2_grpc import GenerationStub
from support.commands.serve import PROMPT, free_port, save_model, start, tiny_model
from support.waiting import wait_until

pytestmark = pytest.mark.timeout(600)
OF_FILE, OF_ENVIRONMENT, OF_CONFIG = (
    "file-f00d5ecret0001",
    "environment-f00d5ecret0002",
    "config-f00d5ecret0003",
)
SECRET = b"f00d5ecret"
"""A part of all keys, and of nothing else."""


@dataclass(frozen=True)
class Keyed:
    """A server whose keys come from all sources."""

    url: str
    grpc: str
    ray: str
    process: subprocess.Popen[str]
    file: Path
    log: Path

    def status(self, key: str | None) -> int:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"{self.url}/v1/models", headers=headers), timeout=60
            ) as answer:
                code: int = answer.status
                return code
        except urllib.error.HTTPError as error:
            return error.code

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keys")
    file, config, log = folder / "keys", folder / "serve.yaml", folder / "serve.log"
    for path, text in ((file, f"# web\n{OF_FILE}\n"), (config, f"serving: {{api_keys: [{OF_CONFIG}]}}\n")):
        path.write_text(text)
        path.chmod(0o600)
    os.environ["RAYMOE_API_KEY"] = OF_ENVIRONMENT
    try:
        process, at = start(
            save_model(tiny_model(), folder / "tiny"),
            log,
            *("--config", str(config), "--set", f"serving.api_keys_file={file}"),
            *("--grpc-port", str(free_port()), "--debug"),
        )
    finally:
        del os.environ["RAYMOE_API_KEY"]
    yield Keyed(at["url"], at["grpc"], at["ray"], process, file, log)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(90) == 0


# Not keys as ids: pytest puts the id into the environment.
@pytest.mark.parametrize("key", [OF_FILE, OF_ENVIRONMENT, OF_CONFIG], ids=["file", "process", "config"])
def test_every_source_holds_over_http_and_grpc(server: Keyed, key: str) -> None:
    assert server.status(key) == 200
    assert server.status(f"{key}x") == server.status(None) == 401
    request = GenerateRequest(text=PROMPT, max_tokens=2)
    with grpc.insecure_channel(server.grpc) as channel:
        stub = GenerationStub(channel)
        assert list(stub.Generate(request, metadata=(("authorization", f"Bearer {key}"),), timeout=60))
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request, timeout=60))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def _words_of(process: psutil.Process) -> bytes:
    """Arguments and environment of a process; of one that ends meanwhile, none."""
    found = b""
    for name in ("cmdline", "environ"):
        try:
            found += Path(f"/proc/{process.pid}/{name}").read_bytes()
        except OSError:
            continue
    return found


def test_no_argument_and_no_environment_of_a_process_holds_a_key(server: Keyed) -> None:
    assert server.status(OF_FILE) == 200
    family = server.family()
    assert len(family) > 5
    assert [one.name() for one in family if SECRET in _words_of(one)] == []
    command = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
    assert b"jobs.cli" in command and SECRET not in command


def test_no_file_of_the_session_holds_a_key(server: Keyed) -> None:
    """Logs, events and exported metrics of Ray and Serve, and what the command printed."""
    assert server.status(f"{OF_CONFIG}-unknown") == 401
    session = _session(server)
    searched = 0
    for path in (server.log, *(path for path in session.rglob("*") if path.is_file())):
        data = path.read_bytes()
        searched += len(data)
        assert SECRET not in data, path
    assert searched > 10_000


def _session(server: Keyed) -> Path:
    """The directory of the server's Ray session, which its raylet has as an argument."""
    for one in server.family():
        for word in one.cmdline():
            name, _, value = word.partition("=")
            if name in ("--session_dir", "--session-dir"):
                return Path(value)
    raise AssertionError("no process of Ray names its session")


LISTING = """
import json, sys, warnings
warnings.simplefilter("ignore")
import ray
from ray import serve
from jobs.fleet.ray_address import running_address
from jobs.fleet.ray_start import connect
connect(running_address(sys.argv[1]), debug=False, tell=None)
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list
from ray.serve._private.constants import SERVE_CONTROLLER_NAME
found = {"status": repr(serve.status())}
controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace="serve")
found["details"] = repr(ray.get(controller.get_serve_instance_details.remote()))
found["actors"] = repr(ray._private.state.actors())
found["jobs"] = repr(ray._private.state.jobs())
found["nodes"] = repr(ray.nodes())
kept = {}
for space in (None, b"serve", b"job", b"fun", b"workers"):
    for key in _internal_kv_list(b"", namespace=space):
        kept[repr((space, key))] = repr(_internal_kv_get(key, namespace=space))
found["kept"] = repr(kept)
print(json.dumps(found))
"""


def test_nothing_that_ray_and_serve_list_or_keep_holds_a_key(server: Keyed) -> None:
    """Status, details as the dashboard shows them, actors, jobs, and all that Ray's control store keeps."""
    done = subprocess.run(
        [sys.executable, "-c", LISTING, server.ray], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert "Interface" in found["details"] or "api" in found["details"]
    assert {name for name, text in found.items() if SECRET.decode() in text} == set()
    assert all(len(text) > 2 for text in found.values()), {name: len(text) for name, text in found.items()}


def test_ray_refuses_who_has_no_token(server: Keyed, tmp_path: Path) -> None:
    """Ray's own ports execute what they receive; the token in `~/.ray` is what keeps others away."""
    script = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, server.ray],
        env={**os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode != 0
    assert "InvalidAuthToken" in done.stderr


def test_a_key_is_replaced_while_the_server_runs(server: Keyed) -> None:
    later = "f00d5ecret-of-later-times"
    server.file.write_text(f"{OF_FILE}\n{later}\n")
    _await_status(server, later, 200)
    assert server.status(OF_FILE) == 200
    began = time.monotonic()
    server.file.write_text(f"{later}\n")
    _await_status(server, OF_FILE, 401)
    print(f"a withdrawn key was refused after {time.monotonic() - began:.1f} s")
    server.file.unlink()
    held = time.monotonic() + 3.0
    while time.monotonic() < held:  # looked at several times meanwhile
        assert server.status(later) == 200
    server.file.write_text(f"{OF_FILE}\n")
    _await_status(server, OF_FILE, 200)


def test_a_fault_of_the_file_and_its_end_are_told_by_the_command(server: Keyed) -> None:
    before = len(_told(server))
    server.file.unlink()
    wait_until(lambda: any("stay valid" in line for line in _told(server)[before:]), seconds=60)
    server.file.write_text(f"{OF_FILE}\n# another\n")
    wait_until(lambda: "read again" in (_told(server) or [""])[-1], seconds=60)
    fault = next(line for line in _told(server) if "stay valid" in line)
    assert str(server.file) in fault and "No such file" in fault


def _told(server: Keyed) -> list[str]:
    """Lines about keys that the command itself has written; those of its processes begin with their names."""
    return [line for line in server.log.read_text().splitlines() if line.startswith("keys: ")]


def _await_status(server: Keyed, key: str, wanted: int) -> None:
    deadline = time.monotonic() + 30
    while server.status(key) != wanted:
        assert time.monotonic() < deadline
