"""Pods of the Ray resources meet the restricted Pod Security Standard, and checkov apart from a list."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.chart import SETS, TOOLS, pods, render

pytestmark = pytest.mark.chart

NOT_FULFILLED = {
    "CKV_K8S_38": "the autoscaler in the head pod asks the Kubernetes API for pods; no other pod has a token",
    "CKV_K8S_40": "the image's user is 1000, as the files of users of Ray's own images are",
    "CKV_K8S_43": "an image's digest is the user's to give (image.digest)",
    "CKV_K8S_15": "a tag of a release does not change; image.pullPolicy is there for others",
    "CKV_K8S_35": "KubeRay itself hands the token on as a variable; secrets of `extraEnv` are the user's",
    "CKV_K8S_8": "pods that send one request and end need no probe",
    "CKV_K8S_9": "pods that send one request and end need no probe",
    "CKV2_K8S_6": "the NetworkPolicies are beside the pods, in the same release",
}
"""Checks that fail, and why."""

ONLY = {
    "CKV_K8S_38": "-head",
    "CKV_K8S_8": ("-test", "-submitter", "serve-pods-head"),  # that one has a container of the user
    "CKV_K8S_9": ("-test", "-submitter", "serve-pods-head"),
    "CKV_K8S_35": tuple(
        f"{values}-{pod}"
        for values in ("serve-extra", "serve-pods", "serve-hub", "serve-s3")
        for pod in ("head", "expert", "trunk", "test")
    ),
}
"""Pods of which alone a check may fail."""

Pod = dict[str, Any]


def all_pods() -> dict[str, Pod]:
    """The pods of all value sets, by set and name."""
    return {f"{values}-{name}": pod for values in SETS for name, pod in pods(render("helm4", values)).items()}


def test_the_restricted_standard_is_fulfilled() -> None:
    for where, pod in all_pods().items():
        spec = pod["spec"]
        for field in ("hostNetwork", "hostPID", "hostIPC", "hostUsers"):
            assert not spec.get(field), where
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        for volume in spec.get("volumes", []):
            kinds = {"emptyDir", "persistentVolumeClaim", "configMap", "secret"}
            kinds |= {"csi", "ephemeral", "projected"}
            given = set(volume) - {"name"}
            assert given <= kinds or where.startswith("serve-extra"), (where, volume)  # that one adds NFS
        own = [spec["containers"][0]]
        own += [one for one in spec.get("initContainers", []) if one["name"] == "fetch-weights"]
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, where
            assert context["capabilities"] == {"drop": ["ALL"]}, where
            assert context.get("readOnlyRootFilesystem", container not in own) is True, where
            assert not any("hostPort" in port for port in container.get("ports", [])), where


def test_what_is_written_to_is_a_volume_of_its_own() -> None:
    for where, pod in all_pods().items():
        name = where.rpartition("-")[2]
        if name in ("test", "submitter"):
            continue
        container = pod["spec"]["containers"][0]
        assert {"/tmp", "/dev/shm", "/home/ray"} <= {at["mountPath"] for at in container["volumeMounts"]}


def test_checkov_finds_nothing_else(tmp_path: Path) -> None:
    for where, pod in all_pods().items():
        file = tmp_path / f"{where}.yaml"
        file.write_text(yaml.safe_dump(pod), encoding="utf-8")
    command = [str(TOOLS / "checks" / "bin" / "checkov"), "--directory", str(tmp_path), "--framework"]
    command += ["kubernetes", "--skip-download", "--compact", "--quiet", "--output", "json", "--soft-fail"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    report = json.loads(run.stdout)
    failed = report["results"]["failed_checks"]
    assert report["summary"]["passed"] > 1000, report["summary"]
    others = {(one["check_id"], one["check_name"], Path(one["file_path"]).stem) for one in failed}
    assert not [one for one in sorted(others) if one[0] not in NOT_FULFILLED]
    found = {one["check_id"] for one in failed}
    assert found == set(NOT_FULFILLED), "a check of the list is fulfilled now; remove it"
    for check, allowed in ONLY.items():
        where = {Path(one["file_path"]).stem for one in failed if one["check_id"] == check}
        assert all(name.endswith(allowed) for name in where), (check, where)
