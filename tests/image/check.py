"""Build the image, and train and serve with it in read-only containers: `make image-test`.

A head, a worker and a submitter are containers of their own. They share a network name space which has a
loopback alone: Ray listens on all interfaces. Ray asks for a token, raymoe's gRPC for certificates.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from building import build, exists, fetch_wheels, make_base, size
from containers import Containers

TOOLS = ("debootstrap", "buildah", "podman", "runc")
HEAD, WORKER = "127.0.0.2", "127.0.0.3"  # Ray replaces 127.0.0.1 by this machine's address
PORT = 6379
DASHBOARD = "http://127.0.0.1:8265"
SERVED = "http://127.0.0.1:8000"
STEPS = 8
NODE = ("--num-cpus", "4", "--resources", '{"raymoe_expert_host": 1}', "--object-store-memory", "268435456")
# As the chart sets them: a host asks for a node of its own.
HOSTS = {
    "cluster.expert_hosts": 2,
    "cluster.cpus_per_host": 0,
    "cluster.host_resources.raymoe_expert_host": 1,
}
TRAINING = {"training.steps": STEPS, "training.workers": 2, "cluster.channel": "grpc", **HOSTS}
ASK = """
import json, sys, urllib.request
url, body = sys.argv[1], sys.argv[2].encode() if len(sys.argv) > 2 else None
request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


def main() -> None:
    """Do it all, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="", help="A local image to build on; empty makes one.")
    parser.add_argument("--suite", default="bookworm", help="Debian's, of the base that is made.")
    parser.add_argument("--mirror", default="", help="Of Debian; empty is debootstrap's own.")
    parser.add_argument("--podman", default="podman --runtime runc --cgroup-manager cgroupfs")
    parser.add_argument("--tag", default="localhost/raymoe:image-test", help="Of the image.")
    parser.add_argument(
        "--work", type=Path, default=Path(".tools/image"), help="Folder of wheels and the log."
    )
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: containers are removed
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        parser.error(f"there is no {', '.join(missing)}; Debian's packages have these names")
    work = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    log = work / "build.log"
    log.write_text("")
    base = chosen.base or f"localhost/raymoe-base:{chosen.suite}"
    if not chosen.base and not exists(base):
        with timed("base image"):
            make_base(base, suite=chosen.suite, mirror=chosen.mirror, log=log)
    with timed("wheels"):
        wheels = fetch_wheels(work / "wheels", log=log)
    with timed("image"):
        build(chosen.tag, base=base, wheels=work / "wheels", log=log)
    say("", f"{size(chosen.tag) / 1e9:.2f} GB, of them base {size(base) / 1e9:.2f} GB; {wheels} wheels")
    check(shlex.split(chosen.podman), chosen.tag)


def check(podman: Sequence[str], image: str) -> None:
    """Run the image's containers and ask what they are for.

    Raises:
        AssertionError, TimeoutError: something is not as it should be.
    """
    with tempfile.TemporaryDirectory(prefix="raymoe-image-") as temporary:
        folders = {Path(temporary) / name: f"/{name}" for name in ("checkpoints", "tls")}
        for folder in folders:
            folder.mkdir()
            folder.chmod(0o777)  # for uid 1000, as fsGroup does it in a pod
        env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAYMOE_TLS_DIR": "/tls"}
        containers = Containers(podman, image, volumes=folders, env=env)
        try:
            with timed("two nodes"):
                start(containers)
            for name in ("head", "worker"):
                restricted(json.loads(containers.execute(name, ["python", "-c", _probe()])))
            say("", "uid 1000, root file system read-only, no capability, no compiler, loopback alone")
            with timed("training"):
                train(containers)
            with timed("serving"):
                serve(containers)
            with timed("stop"):
                stop(containers)
        finally:
            containers.remove()
    print("passed", flush=True)


def start(containers: Containers) -> None:
    """A head, certificates, and a worker that joins it."""
    agent = ("--dashboard-agent-listen-port", "0")  # both nodes would take the same
    head = [
        "ray",
        "start",
        "--head",
        "--block",
        "--node-ip-address",
        HEAD,
        "--port",
        str(PORT),
        *NODE,
        *agent,
    ]
    containers.start("head", [*head, "--dashboard-host", "127.0.0.1"])
    containers.execute("head", ["raymoe", "certs", "/tls"])
    containers.wait("the head is up", lambda: nodes(containers) == 1, timeout=180)
    worker = ["ray", "start", "--block", "--address", f"{HEAD}:{PORT}", "--node-ip-address", WORKER]
    containers.start("worker", [*worker, *NODE, *agent])
    containers.wait("the worker joins", lambda: nodes(containers) == 2, timeout=180)
    true = ["ray", "job", "submit", "--address", DASHBOARD, "--", "true"]
    containers.wait("the cluster takes jobs", lambda: containers.execute("head", true) != "", timeout=180)


def nodes(containers: Containers) -> int:
    """How many nodes of the cluster are alive."""
    script = f"import ray; ray.init('{HEAD}:{PORT}'); print(sum(n['Alive'] for n in ray.nodes()))"
    return int(containers.execute("head", ["python", "-c", script]).splitlines()[-1])


def restricted(found: dict[str, Any]) -> None:
    """Hold what a container may do against what it should."""
    assert (found["uid"], found["gid"]) == (1000, 1000), found
    assert found["read_only"], found
    assert set(found["writes"].values()) == {"EROFS"}, found
    assert found["home"] == "written", found
    assert found["compilers"] == [], found
    assert found["capabilities"] == [0, 0, 0], found
    assert found["no_new_privileges"] == "1", found
    assert found["interfaces"] == ["lo"], found


def train(containers: Containers) -> None:
    """A job from a container that is no node: two workers, and an expert host on each node."""
    raymoe = ["raymoe", "train", "--preset", "tiny", "--output", "/checkpoints/first", *settings(TRAINING)]
    submit = ["ray", "job", "submit", "--address", DASHBOARD, "--", *raymoe]
    said = containers.once("submitter", submit, timeout=600)
    assert "validation loss" in said, said
    state = "from jobs.checkpoints.checkpoint_store import find_checkpoint, read_state; "
    state += "from pathlib import Path; "
    state += "print(read_state(find_checkpoint(Path('/checkpoints/first'))).step)"
    reached = containers.execute("worker", ["python", "-c", state]).strip()
    assert reached == str(STEPS), reached
    say("", next(line for line in said.splitlines() if "validation loss" in line).strip())


def serve(containers: Containers) -> None:
    """The model that was trained, as a job; one completion of it, and where its expert hosts are."""
    submit = ["ray", "job", "submit", "--address", DASHBOARD, "--submission-id", "serve", "--no-wait", "--"]
    containers.execute("head", [*submit, "raymoe", "serve", "/checkpoints/first", *settings(HOSTS)])

    def answers() -> bool:
        assert job(containers, "serve") in ("PENDING", "RUNNING"), containers.execute(
            "head", ["ray", "job", "logs", "--address", DASHBOARD, "serve"]
        )
        ask(containers, f"{SERVED}/health")
        return True

    containers.wait("the model is served", answers, timeout=300)
    body = {"prompt": "def ", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    answer = json.loads(ask(containers, f"{SERVED}/v1/completions", json.dumps(body)))
    assert answer["usage"]["completion_tokens"] == 16, answer
    assert answer["choices"][0]["finish_reason"] == "length", answer
    status = json.loads(
        containers.execute("head", ["raymoe", "status", "--address", f"{HEAD}:{PORT}", "--json"])
    )
    placed = {host["node"] for host in status["hosts"]}
    assert len(status["hosts"]) == len(placed) == 2, status
    assert all(host["rows"] > 0 for host in status["hosts"]), status
    say("", f"16 tokens, by {len(status['hosts'])} expert hosts on {len(placed)} nodes")


def stop(containers: Containers) -> None:
    """The job that serves ends when it is told to."""
    containers.execute("head", ["ray", "job", "stop", "--address", DASHBOARD, "serve"])
    assert job(containers, "serve") == "STOPPED"


def job(containers: Containers, name: str) -> str:
    """The status of a submitted job."""
    script = "import sys; from ray.job_submission import JobSubmissionClient as Client; "
    script += "print(Client(sys.argv[1]).get_job_status(sys.argv[2]).value)"
    return containers.execute("head", ["python", "-c", script, DASHBOARD, name]).splitlines()[-1]


def ask(containers: Containers, *arguments: str) -> str:
    """What the served model answers to the head's container."""
    return containers.execute("head", ["python", "-c", ASK, *arguments])


def settings(values: dict[str, Any]) -> list[str]:
    """Fields of the configuration as options."""
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


def _probe() -> str:
    return Path(__file__).with_name("probe.py").read_text(encoding="utf-8")


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say what a step took."""
    began = time.monotonic()
    yield
    say(what, f"{time.monotonic() - began:.0f} s")


def say(what: str, result: str) -> None:
    """One line of the report."""
    print(f"{what:12} {result}", flush=True)


if __name__ == "__main__":
    main()
