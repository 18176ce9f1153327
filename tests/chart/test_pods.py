"""Pods have one template: every value reaches every pod, once, and wins over what the chart has there."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helm.kuberay import FILE, extracted
from helm.values import read_values
from support.chart import CHART, HELMS, KUBE, NO_KUBE, Manifest, clusters, helm, manifests, pods

pytestmark = pytest.mark.chart

CONTAINER: dict[str, Any] = {
    "name": "beside",
    "image": "registry.example/beside:1",
    "securityContext": {"runAsUser": 7},
}
FIELDS: dict[str, Any] = {
    "extend": ["tolerations"],
    "image": "registry.example/mine:1",
    "env": {"A": "env", "B": "env", "HOME": "/mine"},
    "extraEnv": [
        {"name": "B", "value": "extra"},
        {"name": "C", "valueFrom": {"fieldRef": {"fieldPath": "a"}}},
    ],
    "envFrom": [{"secretRef": {"name": "variables"}}],
    "podLabels": {"label": "1e3"},
    "podAnnotations": {"annotation": "null"},
    "nodeSelector": {"node": "on"},
    "tolerations": [{"key": "taint", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [
        {"maxSkew": 3, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {}}
    ],
    "priorityClassName": "123",
    "runtimeClassName": "yes",
    "schedulerName": "off",
    "dnsPolicy": "None",
    "dnsConfig": {"nameservers": ["10.0.0.1"]},
    "hostAliases": [{"ip": "10.0.0.2", "hostnames": ["a.example"]}],
    "resourceClaims": [{"name": "device", "resourceClaimName": "1e3"}],
    "initContainers": [{**CONTAINER, "name": "first"}],
    "extraContainers": [CONTAINER],
    "extraVolumes": [{"name": "own", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "own", "mountPath": "/own"}],
    "podSecurityContext": {"runAsUser": 0, "runAsNonRoot": False},
    "securityContext": {"readOnlyRootFilesystem": False},
    "podSpec": {"hostNetwork": True, "enableServiceLinks": True, "serviceAccountName": "other"},
    "containerSpec": {"imagePullPolicy": "Always", "workingDir": "/own", "stdin": False},
}
"""A value for each field of `podDefaults`."""


def made(version: str, tmp_path: Path, values: Mapping[str, Any]) -> list[Manifest]:
    """The objects of these values."""
    file = tmp_path / "values.json"  # YAML, whose readers differ about 1e3
    file.write_text(json.dumps(values), encoding="utf-8")
    run = helm(version, "template", "demo", CHART, "--namespace", "moe", "--values", file)
    return manifests(run.stdout)


def served(**values: Any) -> dict[str, Any]:
    return {"mode": "serve", "serve": {"checkpoint": "/checkpoints/demo"}, **values}


def is_as_given(pod: Manifest) -> None:
    """Assert that a pod has all of `FIELDS`."""
    spec, given = pod["spec"], FIELDS
    main, beside = spec["containers"]
    assert main["image"] == given["image"]
    names = [one["name"] for one in main["env"]]
    assert len(names) == len(set(names)), "Kubernetes keeps a variable once"
    values = {one["name"]: one.get("value") for one in main["env"]}
    assert (values["A"], values["B"], values["HOME"]) == ("env", "extra", "/mine")
    assert given["extraEnv"][1] in main["env"]
    assert main["envFrom"] == given["envFrom"]
    assert pod["metadata"]["labels"]["label"] == "1e3"
    assert pod["metadata"]["annotations"]["annotation"] == "null"
    same = "nodeSelector tolerations affinity topologySpreadConstraints priorityClassName runtimeClassName"
    for name in f"{same} schedulerName dnsPolicy dnsConfig hostAliases resourceClaims".split():
        assert spec[name] == given[name], name
    (first,) = spec["initContainers"]
    for container, name in ((first, "first"), (beside, "beside")):
        assert (container["name"], container["image"]) == (name, CONTAINER["image"])
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsUser": 7,
        }
    assert given["extraVolumes"][0] in spec["volumes"]
    assert given["extraVolumeMounts"][0] in main["volumeMounts"]
    assert spec["securityContext"]["runAsUser"] == 0 and spec["securityContext"]["runAsNonRoot"] is False
    assert spec["securityContext"]["fsGroup"] == 1000, "the other fields stay"
    assert main["securityContext"]["readOnlyRootFilesystem"] is False
    assert main["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert spec["hostNetwork"] and spec["enableServiceLinks"] and spec["serviceAccountName"] == "other"
    assert (main["imagePullPolicy"], main["workingDir"], main["stdin"]) == ("Always", "/own", False)


def test_every_field_is_tried() -> None:
    (section,) = (child for child in read_values().children if child.name == "podDefaults")
    assert set(FIELDS) == {child.path[-1] for child in section.children}


@pytest.mark.parametrize("version", HELMS)
def test_the_defaults_of_all_pods_reach_all_pods(version: str, tmp_path: Path) -> None:
    found = pods(made(version, tmp_path, served(podDefaults=FIELDS)))
    assert set(found) == {"head", "expert", "trunk", "test"}
    found |= {
        "submitter": pods(made(version, tmp_path, {"mode": "train", "podDefaults": FIELDS}))["submitter"]
    }
    for pod in found.values():
        is_as_given(pod)


@pytest.mark.parametrize("version", HELMS)
def test_each_pod_takes_every_field_for_itself(version: str, tmp_path: Path) -> None:
    values = served(head=FIELDS, workerGroups={"trunk": FIELDS}, tests=FIELDS)
    values["podDefaults"] = {"env": {"A": "default", "D": "default"}, "schedulerName": "default"}
    found = pods(made(version, tmp_path, values))
    for name in ("head", "trunk", "test"):
        is_as_given(found[name])
        assert {"name": "D", "value": "default"} in found[name]["spec"]["containers"][0]["env"]
    assert found["expert"]["spec"]["schedulerName"] == "default"
    found = pods(made(version, tmp_path, {"mode": "train", "train": {"submitter": FIELDS}}))
    is_as_given(found["submitter"])
    assert "schedulerName" not in found["head"]["spec"]


@pytest.mark.parametrize("version", HELMS)
def test_an_empty_value_wins_too(version: str, tmp_path: Path) -> None:
    values = served(
        podDefaults={"env": {"A": "default"}, "securityContext": {"readOnlyRootFilesystem": True}},
        workerDefaults={"env": {"A": "group's"}, "podSecurityContext": {"runAsUser": 5}, "drainSeconds": 9},
        workerGroups={
            "trunk": {
                "env": {"A": ""},
                "securityContext": {"readOnlyRootFilesystem": False},
                "podSecurityContext": {"runAsUser": 0},
                "drainSeconds": 0,
            }
        },
        head={"rayStartParams": {"dashboard-host": "127.0.0.1", "include-dashboard": "false"}},
    )
    objects = made(version, tmp_path, values)
    trunk = pods(objects)["trunk"]["spec"]
    (container,) = trunk["containers"]
    assert {"name": "A", "value": ""} in container["env"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is False
    assert trunk["securityContext"]["runAsUser"] == 0
    assert "lifecycle" not in container
    (cluster,) = clusters(objects)
    assert cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"


@pytest.mark.parametrize("version", HELMS)
def test_what_is_passed_on_wins(version: str, tmp_path: Path) -> None:
    values = served(
        head={
            "groupSpec": {"serviceType": "NodePort", "headService": {"spec": {"type": "NodePort"}}},
            "containerSpec": {
                "readinessProbe": {"tcpSocket": {"port": 6379}},
                "ports": [
                    {"name": "metrics", "containerPort": 9090},
                    {"name": "more", "containerPort": 9091},
                ],
            },
        },
        workerGroups={"trunk": {"groupSpec": {"numOfHosts": 2}}},
        autoscaling={
            "env": {"HOME": "/mine"},
            "image": "registry.example/autoscaler:1",
            "securityContext": {"runAsUser": 3},
            "options": {"imagePullPolicy": "Never", "command": ["/bin/mine"]},
        },
    )
    (cluster,) = clusters(made(version, tmp_path, values))
    head = cluster["headGroupSpec"]
    assert head["serviceType"] == "NodePort" and head["headService"] == {"spec": {"type": "NodePort"}}
    (container,) = head["template"]["spec"]["containers"]
    assert container["readinessProbe"] == {"tcpSocket": {"port": 6379}}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert (ports["metrics"], ports["more"], ports["serve"]) == (9090, 9091, 8000)
    assert (ports["as-metrics"], ports["dash-metrics"]) == (44217, 44227), "as Ray has them"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert groups["trunk"]["numOfHosts"] == 2 and "numOfHosts" not in groups["expert"]
    autoscaler = cluster["autoscalerOptions"]
    assert {"name": "HOME", "value": "/mine"} in autoscaler["env"]
    assert autoscaler["image"] == "registry.example/autoscaler:1"
    assert autoscaler["securityContext"]["runAsUser"] == 3
    assert autoscaler["securityContext"]["allowPrivilegeEscalation"] is False
    assert (autoscaler["imagePullPolicy"], autoscaler["command"]) == ("Never", ["/bin/mine"])


def test_a_constraint_without_a_selector_counts_the_pods_of_its_group(tmp_path: Path) -> None:
    constraint = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
    given = copy.deepcopy(constraint)
    found = pods(made("helm4", tmp_path, served(podDefaults={"topologySpreadConstraints": [given]})))
    for name in ("head", "trunk", "expert"):
        (made_of_it,) = found[name]["spec"]["topologySpreadConstraints"]
        counted = made_of_it.pop("labelSelector")["matchLabels"]
        assert made_of_it == constraint
        assert counted["app.kubernetes.io/component"] == name
        assert counted.items() <= found[name]["metadata"]["labels"].items()


def test_no_template_uses_a_merge_that_loses_what_is_empty() -> None:
    for file in (CHART / "templates").rglob("*"):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            assert "merge (" not in text and "mergeOverwrite" not in text, f"{file.name}: use raymoe.over"


def test_the_schemas_of_pods_are_kuberays() -> None:
    if not KUBE.is_dir():
        pytest.skip(NO_KUBE)
    known = json.loads(FILE.read_text(encoding="utf-8"))
    assert known == extracted(KUBE / "crds"), "run python -m helm.kuberay ../shared/kube/crds"
