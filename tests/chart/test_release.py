"""Releases by helm 3 and helm 4 against a fake API server: install, upgrade, rollback, uninstall."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import yaml

from support.chart import CHART, HELMS, KUBE, NO_KUBE, TOOLS
from support.waiting import wait_until

pytestmark = [pytest.mark.chart, pytest.mark.skipif(not KUBE.is_dir(), reason=NO_KUBE)]
_SECONDS = 120


@dataclass
class Kubernetes:
    """A fake API server, and helm as its client."""

    url: str
    config: Path
    version: str

    def helm(self, *arguments: str, check: bool = True) -> str:
        """Run helm in the namespace `moe`."""
        command = [str(TOOLS / self.version / "helm"), "--kubeconfig", str(self.config), "-n", "default"]
        run = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=_SECONDS)
        assert not check or run.returncode == 0, run.stderr
        return run.stdout if check else run.stdout + run.stderr

    def get(self, path: str) -> Any:
        """An object, or None."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            error.close()
            return None

    def patch(self, path: str, change: Any) -> None:
        """Merge a change into an object, as another client would."""
        request = urllib.request.Request(
            f"{self.url}{path}",
            json.dumps(change).encode(),
            {"Content-Type": "application/merge-patch+json"},
            method="PATCH",
        )
        with urllib.request.urlopen(request, timeout=10):
            pass

    def names(self) -> list[str]:
        """Kinds and names of all objects except helm's own records."""
        found = []
        for path in (
            "/api/v1/namespaces/default/secrets",
            "/api/v1/namespaces/default/configmaps",
            "/api/v1/namespaces/default/serviceaccounts",
            "/api/v1/namespaces/default/persistentvolumeclaims",
            "/apis/policy/v1/namespaces/default/poddisruptionbudgets",
            "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies",
            "/apis/ray.io/v1/namespaces/default/rayclusters",
            "/apis/ray.io/v1/namespaces/default/rayservices",
            "/apis/ray.io/v1/namespaces/default/rayjobs",
        ):
            found += [
                f"{path.rpartition('/')[2]}/{one['metadata']['name']}"
                for one in self.get(path)["items"]
                if not one["metadata"]["name"].startswith("sh.helm.release")
            ]
        return sorted(found)


@pytest.fixture(params=HELMS)
def kubernetes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kubernetes]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    config = tmp_path / "kubeconfig"
    context = {"name": "one", "context": {"cluster": "one", "user": "one"}}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "one", "cluster": {"server": url}}],
        "users": [{"name": "one", "user": {}}],
        "contexts": [context],
        "current-context": "one",
    }
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    config.chmod(0o600)
    command = [sys.executable, "-W", "ignore", str(KUBE / "fake_apiserver.py"), str(5 * _SECONDS), str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:

        def answers() -> bool:
            assert server.poll() is None
            urllib.request.urlopen(f"{url}/version", timeout=5).close()
            return True

        wait_until(answers, every=0.1, ignoring=URLError)
        yield Kubernetes(url, config, request.param)
    finally:
        server.kill()
        server.wait()


SECRET = "/api/v1/namespaces/default/secrets/moe-raymoe-token"
CERTIFICATES = "/api/v1/namespaces/default/secrets/moe-raymoe-tls"
CLUSTER = "/apis/ray.io/v1/namespaces/default/rayclusters/moe-raymoe"
SERVICE = "/apis/ray.io/v1/namespaces/default/rayservices/moe-raymoe"


def test_a_service_lives(kubernetes: Kubernetes) -> None:
    told = kubernetes.helm("install", "moe", str(CHART), "--set", "serve.checkpoint=/checkpoints/demo")
    assert "helm test -n default moe" in told and "raymoe scale 2" in told
    token = kubernetes.get(SECRET)["data"]["auth_token"]
    certificates = kubernetes.get(CERTIFICATES)["data"]
    before = kubernetes.names()
    assert "rayservices/moe-raymoe" in before and "persistentvolumeclaims/moe-raymoe-checkpoints" in before

    kubernetes.helm(
        "upgrade", "moe", str(CHART), "--reuse-values", "--set", "workerGroups.expert.maxReplicas=12"
    )
    service = kubernetes.get(SERVICE)
    groups = {group["groupName"]: group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert groups["expert"]["maxReplicas"] == 12
    assert kubernetes.get(SECRET)["data"]["auth_token"] == token, "running pods know the old token"
    assert kubernetes.get(CERTIFICATES)["data"] == certificates, "running pods trust the old authority"
    assert kubernetes.names() == before

    kubernetes.helm("rollback", "moe", "1")
    service = kubernetes.get(SERVICE)
    groups = {group["groupName"]: group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert groups["expert"]["maxReplicas"] == 8
    assert kubernetes.get(SECRET)["data"]["auth_token"] == token

    if kubernetes.version == "helm3":  # with helm 4 the double's pods never end
        assert "Succeeded" in kubernetes.helm("test", "moe")
    kubernetes.helm("uninstall", "moe")
    assert kubernetes.names() == ["persistentvolumeclaims/moe-raymoe-checkpoints"], "checkpoints are kept"
    kubernetes.helm("install", "moe", str(CHART), "--set", "serve.checkpoint=/checkpoints/demo")
    assert kubernetes.names() == before, "and taken over by the next release of that name"


def test_an_upgrade_leaves_the_autoscaler_what_it_has_set(kubernetes: Kubernetes) -> None:
    kubernetes.helm("install", "moe", str(CHART), "--set", "mode=cluster")
    groups = kubernetes.get(CLUSTER)["spec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["expert", "trunk"]
    for group, pods in zip(groups, (6, 3), strict=True):
        assert not group.get("replicas")
        group["replicas"] = pods
    groups[0]["scaleStrategy"] = {"workersToDelete": ["moe-raymoe-expert-worker-x"]}
    kubernetes.patch(CLUSTER, {"spec": {"workerGroupSpecs": groups}})

    kubernetes.helm(
        "upgrade", "moe", str(CHART), "--reuse-values", "--set", "workerGroups.trunk.maxReplicas=2"
    )
    expert, trunk = kubernetes.get(CLUSTER)["spec"]["workerGroupSpecs"]
    assert expert["replicas"] == 6
    assert expert["scaleStrategy"] == {"workersToDelete": ["moe-raymoe-expert-worker-x"]}
    assert trunk["replicas"] == 2, "not above the new maxReplicas"


JOB = "/apis/ray.io/v1/namespaces/default/rayjobs/moe-raymoe"


@pytest.mark.parametrize("suspended", [True, False], ids=["waits in the queue", "was admitted"])
def test_an_upgrade_leaves_kueue_what_it_has_set(kubernetes: Kubernetes, suspended: bool) -> None:
    values = str(CHART / "ci" / "train-kueue.yaml")
    kubernetes.helm("install", "moe", str(CHART), "--values", values)
    job = kubernetes.get(JOB)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert "suspend" not in job["spec"]
    kubernetes.patch(JOB, {"spec": {"suspend": suspended}})

    kubernetes.helm("upgrade", "moe", str(CHART), "--values", values, "--set", "train.backoffLimit=5")
    job = kubernetes.get(JOB)
    assert job["spec"]["suspend"] is suspended
    assert job["spec"]["backoffLimit"] == 5
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"


def test_two_releases_in_a_namespace_do_not_clash(kubernetes: Kubernetes) -> None:
    kubernetes.helm("install", "moe", str(CHART), "--set", "serve.checkpoint=/checkpoints/demo")
    first = kubernetes.names()
    kubernetes.helm("install", "other", str(CHART), "--set", "mode=train")
    both = kubernetes.names()
    assert set(first) < set(both) and len(both) == 2 * len(first) + 1  # and the job's script
    selectors = [
        policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/instance"]
        for policy in kubernetes.get("/apis/networking.k8s.io/v1/namespaces/default/networkpolicies")["items"]
    ]
    assert sorted(selectors) == ["moe", "moe", "other", "other"]
    kubernetes.helm("uninstall", "other")
    assert set(first) <= set(kubernetes.names())


def test_a_resource_that_kuberay_would_not_take_is_not_installed(kubernetes: Kubernetes) -> None:
    told = kubernetes.helm(
        "install", "moe", str(CHART), "--set", "mode=cluster,clusterSpec.unknown=1", check=False
    )
    assert "unknown" in told and "STATUS: deployed" not in told
