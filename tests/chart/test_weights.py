"""How weights get into the pods: the container that fetches them runs here, with `hf` and a fake hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.chart import CHART, HELMS, Manifest, clusters, helm, manifests, pods, refusal, render
from support.waiting import wait_until

pytestmark = pytest.mark.chart

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000}
SHA = "0123456789abcdef0123456789abcdef01234567"


def fetchers(objects: list[Manifest]) -> dict[str, Manifest]:
    """The containers that fetch weights, by the pod."""
    found = {}
    for name, pod in pods(objects).items():
        for container in pod["spec"].get("initContainers", []):
            assert container["name"] == "fetch-weights"
            found[name] = container
    return found


def arguments(objects: list[Manifest]) -> dict[str, Any]:
    """Arguments of the application in the RayService."""
    (service,) = (one for one in objects if one["kind"] == "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    return dict(application["args"])


class Fetching:
    """A container that fetches, as Kubernetes starts it, on a folder in place of the volume."""

    def __init__(self, container: Manifest, folder: Path, command: list[str] | None = None) -> None:
        self.variables = {one["name"]: one["value"] for one in container["env"]}
        for name in ("TARGET", "PARTIAL"):
            self.variables[name] = self.variables[name].replace("/checkpoints", str(folder))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.variables |= {"PATH": path, "HOME": str(folder), "HF_HOME": str(folder / "home"), "PAUSE": "0"}
        given = container["command"] if command is None else [*container["command"][:4], *command]
        self.command = [re.sub(r"\$\((\w+)\)", self._expanded, word) for word in given]
        self.target, self.partial = Path(self.variables["TARGET"]), Path(self.variables["PARTIAL"])

    def _expanded(self, reference: re.Match[str]) -> str:
        return self.variables.get(reference[1], reference[0])

    def run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command, env=self.variables, capture_output=True, text=True, timeout=120, check=False
        )

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command, env=self.variables, text=True, start_new_session=True)


class Hub(BaseHTTPRequestHandler):
    """A fake of Hugging Face's hub with one model."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/org/name/resolve/{SHA}/")
        content, headers = b"", {}
        if path == "/api/models/org/name/revision/v1":
            siblings = [{"rfilename": one} for one in FILES]
            content = json.dumps({"id": "org/name", "sha": SHA, "siblings": siblings}).encode()
        elif path == f"/api/models/org/name/tree/{SHA}":
            tree = [
                {"type": "file", "path": one, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for one, data in FILES.items()
            ]
            content = json.dumps(tree).encode()
        elif name in FILES:
            content = FILES[name]
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA}
        self.asked.append(f"{self.command} {path}")
        self.send_response(200 if content else 404)
        for header, value in headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """The address of a fake hub, and what it was asked."""
    handler = type("Asked", (Hub,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def container() -> Manifest:
    """The container that fetches from Hugging Face into the volume of all pods."""
    return fetchers(served("hf://org/name@v1", "--set", "serve.fetch.tries=2"))["head"]


def served(checkpoint: str, *more: str, version: str = "helm4") -> list[Manifest]:
    given = ["--set", f"serve.checkpoint={checkpoint}", *more]
    return manifests(helm(version, "template", "demo", CHART, *given).stdout)


def test_hf_writes_the_model_once(container: Manifest, hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = hub
    fetching = Fetching(container, tmp_path)
    fetching.variables["HF_ENDPOINT"] = address
    run = fetching.run()
    assert run.returncode == 0, run.stdout + run.stderr
    assert {file.name: file.read_bytes() for file in fetching.target.iterdir()} == FILES
    assert [file.name for file in fetching.target.parent.iterdir()] == ["name"], "nothing else is left"
    before = len(asked)
    assert fetching.run().returncode == 0
    assert len(asked) == before, "what is there is not fetched again"


PART = 'mkdir -p "$PARTIAL"; echo part >> "$PARTIAL/a"; '


def test_a_part_is_never_at_the_target(container: Manifest, tmp_path: Path) -> None:
    failing = Fetching(container, tmp_path, ["sh", "-c", f'{PART} [ ! -d "$TARGET" ] && exit 3'])
    run = failing.run()
    assert run.returncode == 1 and not failing.target.exists()
    assert "hf://org/name@v1 could not be fetched" in run.stderr
    assert (failing.partial / "a").read_text() == "part\n" * 2, (
        "two attempts, the second on the first's files"
    )
    done = Fetching(container, tmp_path, ["sh", "-c", PART]).run()
    assert done.returncode == 0, done.stderr
    assert (failing.target / "a").read_text() == "part\n" * 3, "another pod goes on with them"
    assert not failing.partial.exists()


def test_a_killed_pod_leaves_no_target(container: Manifest, tmp_path: Path) -> None:
    hanging = Fetching(container, tmp_path, ["sh", "-c", f"{PART} exec sleep 600"])
    process = hanging.start()
    try:
        wait_until(lambda: (hanging.partial / "a").exists(), seconds=60)
    finally:
        os.killpg(process.pid, 9)
        process.wait(60)
    assert not hanging.target.exists()
    assert Fetching(container, tmp_path, ["sh", "-c", PART]).run().returncode == 0
    assert (hanging.target / "a").read_text() == "part\n" * 2


def test_of_two_pods_one_fetches(container: Manifest, tmp_path: Path) -> None:
    go = tmp_path / "go"
    waiting = f"{PART} until [ -e {go} ]; do sleep 0.05; done"
    first = Fetching(container, tmp_path, ["sh", "-c", waiting])
    processes = [first.start()]
    wait_until(lambda: (first.partial / "a").exists(), seconds=60)
    processes.append(Fetching(container, tmp_path, ["sh", "-c", PART]).start())
    go.touch()
    assert [process.wait(60) for process in processes] == [0, 0]
    assert (first.target / "a").read_text() == "part\n"


def test_no_files_are_an_error(container: Manifest, tmp_path: Path) -> None:
    run = Fetching(container, tmp_path, ["true"]).run()
    assert run.returncode == 1 and "holds no files" in run.stderr


def test_the_head_fetches_into_the_volume_of_all_pods() -> None:
    objects = render("helm4", "serve-hub")
    found = fetchers(objects)
    assert set(found) == {"head"}
    values = {one["name"]: one["value"] for one in found["head"]["env"]}
    assert arguments(objects)["checkpoint"] == values["TARGET"]
    assert values["TARGET"] == "/checkpoints/hf/main/moonshotai/Moonlight-16B-A3B"
    assert found["head"]["envFrom"] == [{"secretRef": {"name": "hugging-face"}}]
    for name, pod in pods(objects).items():
        if name != "test":
            (container,) = pod["spec"]["containers"]
            assert {"name": "checkpoints", "mountPath": "/checkpoints"} in container["volumeMounts"]


def test_without_a_volume_of_all_pods_each_fetches_into_its_own() -> None:
    objects = render("helm4", "serve-s3")
    found = fetchers(objects)
    assert set(found) == {"head", "trunk", "expert"}
    for name, container in found.items():
        values = {one["name"]: one["value"] for one in container["env"]}
        assert arguments(objects)["checkpoint"] == values["TARGET"] == "/checkpoints/s3/models/deepseek/v3"
        assert container["command"][4:] == [
            "aws",
            "s3",
            "sync",
            "--no-progress",
            "$(SOURCE)",
            "$(PARTIAL)",
        ]
        assert values["SOURCE"] == "s3://models/deepseek/v3"
        spec = pods(objects)[name]["spec"]
        mount = {"name": "weights", "mountPath": "/checkpoints"}
        assert mount in container["volumeMounts"] and mount in spec["containers"][0]["volumeMounts"]
        assert {"name": "weights", "emptyDir": {"sizeLimit": "800Gi"}} in spec["volumes"]


def test_a_claim_is_mounted_and_not_copied() -> None:
    objects = render("helm4", "serve-claim")
    assert not fetchers(objects)
    assert arguments(objects)["checkpoint"] == "/model/deepseek/v3"
    for name, pod in pods(objects).items():
        if name != "test":
            claim = {"claimName": "team-models", "readOnly": True}
            assert {"name": "model", "persistentVolumeClaim": claim} in pod["spec"]["volumes"]
            mounts = pod["spec"]["containers"][0]["volumeMounts"]
            assert {"name": "model", "mountPath": "/model", "readOnly": True} in mounts


@pytest.mark.parametrize(
    ("checkpoint", "path"),
    [
        ("hf://org/name", "/checkpoints/hf/main/org/name"),
        ("hf://org/name@refs/pr/1", "/checkpoints/hf/refs+pr+1/org/name"),
        ("pvc://123456", "/model"),
        ("pvc://1e3/a/", "/model/a"),
        ("/models/demo", "/models/demo"),
    ],
)
def test_where_an_address_is(checkpoint: str, path: str) -> None:
    assert arguments(served(checkpoint))["checkpoint"] == path


REFUSED = [
    ("serve.checkpoint=hf://name", "which is no address of a Hugging Face model: write hf://ORG/NAME"),
    ("serve.checkpoint=hf://org/name@", "which is no address of a Hugging Face model"),
    ("serve.checkpoint=hf://org/../name", "which is no address of a Hugging Face model"),
    ("serve.checkpoint=s3://bucket", "write s3://BUCKET/PREFIX"),
    ("serve.checkpoint=s3://bucket/a/../b", "write s3://BUCKET/PREFIX"),
    ("serve.checkpoint=s3://bucket/a", "the image has no command for it: set serve.fetch.image"),
    ("serve.checkpoint=pvc:///a", "write pvc://CLAIM/PATH"),
    ("serve.checkpoint=gs://bucket/a", "no absolute path and no address"),
    ("serve.fetch.env.TARGET=/a", "serve.fetch.env sets TARGET"),
    ("serve.fetch.resources.limits.cpu=10m", "serve.fetch.resources.limits.cpu (10m) is less than"),
    ("checkpoints.mountPath=/model", "checkpoints.mountPath is /model, where the pods have something"),
    ("serve.config.serving.api_keys[0]=a-key-in-plain-text", "would stand in the RayService in plain text"),
    ("serve.config.serving.api_keys_file=/a", "are both set: remove one of them"),
]


@pytest.mark.parametrize(("setting", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_cannot_work_is_refused(setting: str, why: str) -> None:
    told = refusal("helm4", "serve.checkpoint=pvc://models/a", "serve.apiKeys.existingSecret=keys", setting)
    assert why in told
    assert "a-key-in-plain-text" not in told


@pytest.mark.parametrize("version", HELMS)
def test_keys_are_files_of_a_secret(version: str) -> None:
    digest = "sha256:" + "a" * 64
    more = (
        "--set",
        "serve.apiKeys.existingSecret=1e3",
        "--set",
        f"serve.config.serving.api_keys[0]={digest}",
    )
    objects = served("/checkpoints/demo", *more, version=version)
    serving = arguments(objects)["serving"]
    assert serving == {"api_keys_file": "/etc/raymoe-keys", "api_keys": [digest]}
    found = pods(objects)
    for name in ("head", "test"):
        spec = found[name]["spec"]
        secret = {"secretName": "1e3", "defaultMode": 0o440}
        assert {"name": "api-keys", "secret": secret} in spec["volumes"]
        mount = {"name": "api-keys", "mountPath": "/etc/raymoe-keys", "readOnly": True}
        assert mount in spec["containers"][0]["volumeMounts"], (
            "without a subPath, which would not follow a change"
        )
    for name in ("trunk", "expert"):
        assert "api-keys" not in str(found[name]), "the interface and its front are on the head"
    (cluster,) = clusters(objects)
    assert "api" not in str(cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]).lower()
