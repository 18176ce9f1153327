"""The scripts of the chart's objects: the job's script, and that of the pod of `helm test`."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from support.chart import render

pytestmark = pytest.mark.chart


def script_of(values: str) -> str:
    """The script of a value set's job."""
    (found,) = (
        one["data"]["train.sh"]
        for one in render("helm4", values)
        if one["kind"] == "ConfigMap" and "train.sh" in one.get("data", {})
    )
    return str(found)


def run_script(script: str, directory: Path) -> list[str]:
    """Run the script with a `raymoe` that prints its arguments."""
    fake = directory / "bin" / "raymoe"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    fake.chmod(0o755)
    path = f"{fake.parent}:/usr/bin:/bin"
    run = subprocess.run(
        ["bash", "-c", script], env={"PATH": path}, check=True, capture_output=True, text=True, timeout=30
    )
    return run.stdout.splitlines()


def test_a_job_begins_a_run_and_goes_on_with_it(tmp_path: Path) -> None:
    script = script_of("train").replace("/checkpoints/demo", str(tmp_path / "run"))
    begun = run_script(script, tmp_path)
    assert begun[:5] == ["train", "--preset", "demo", "--output", str(tmp_path / "run")]
    assert 'cluster.host_resources={"raymoe_expert_host":1}' in begun and begun[-1] == "--json"
    (tmp_path / "run" / "checkpoints" / "step-00000010").mkdir(parents=True)
    again = run_script(script, tmp_path)
    assert again == ["train", "--resume", str(tmp_path / "run"), *begun[5:]]


class Answering(BaseHTTPRequestHandler):
    """A fake of the served endpoint."""

    asked: list[tuple[str, dict[str, object], str | None]]
    tokens = 16

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body, self.headers["Authorization"]))
        answer = {
            "usage": {"completion_tokens": self.tokens},
            "choices": [{"text": "x", "finish_reason": None}],
        }
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.mark.parametrize(("tokens", "passes"), [(16, True), (0, False)])
def test_the_tests_pod_sends_a_completion(tokens: int, passes: bool, tmp_path: Path) -> None:
    (pod,) = (one for one in render("helm4", "serve-full") if one["kind"] == "Pod")
    (container,) = pod["spec"]["containers"]
    env = {one["name"]: one["value"] for one in container["env"]}
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    assert mounts[env["KEYS"]] == "api-keys"
    env["KEYS"] = str(tmp_path)
    (tmp_path / "..data").write_text("of-kubernetes-itself", encoding="utf-8")
    digest = "sha256:" + "0" * 64
    (tmp_path / "callers").write_text(f"# of two teams\n\n{digest}\nchange-me \nother\n", encoding="utf-8")
    handler = type("Handler", (Answering,), {"asked": [], "tokens": tokens})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        code = container["command"][-1].replace("http://demo-raymoe-serve-svc:8000", url)
        run = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
        )
        server.shutdown()
        thread.join()
    assert (run.returncode == 0) is passes, run.stderr
    body = {"prompt": "def ", "max_tokens": 16, "temperature": 0}
    assert handler.asked == [("/v1/completions", body, "Bearer change-me")]
