"""What a pod has beside the fields of the defaults: lists that are extended, and containers beside Ray's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from support.chart import CHART, HELMS, Manifest, clusters, helm, manifests, pods, refusal

pytestmark = pytest.mark.chart

PROXY = {"secretRef": {"name": "proxy"}}
OWN = {"secretRef": {"name": "own"}}
TOKEN = {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
MOUNT = {"name": "certificates", "mountPath": "/etc/ssl/own", "readOnly": True}
VOLUME = {"name": "certificates", "configMap": {"name": "certificates"}}
TAINT = {"key": "dedicated", "operator": "Exists"}
OWN_TAINT = {"key": "gpu", "operator": "Exists"}


def made(version: str, tmp_path: Path, values: Mapping[str, Any]) -> list[Manifest]:
    """The objects of these values, which serve a model of the hub."""
    file = tmp_path / "values.json"
    file.write_text(json.dumps({"serve": {"checkpoint": "hf://org/name"}, **values}), encoding="utf-8")
    return manifests(helm(version, "template", "demo", CHART, "--values", file).stdout)


@pytest.mark.parametrize("version", HELMS)
def test_the_defaults_of_pods_reach_the_containers_beside_rays(version: str, tmp_path: Path) -> None:
    defaults = {"env": {"A": "default", "B": "default"}, "extraEnv": [TOKEN], "envFrom": [PROXY]}
    defaults |= {"extraVolumes": [VOLUME], "extraVolumeMounts": [MOUNT]}
    fetch = {"env": {"B": "own"}, "envFrom": [OWN]}
    values = {
        "podDefaults": defaults,
        "serve": {"checkpoint": "hf://org/name", "fetch": fetch},
        "autoscaling": {"extraEnv": [{"name": "TOKEN", "value": "own"}]},
    }
    objects = made(version, tmp_path, values)
    (cluster,) = clusters(objects)
    autoscaler = cluster["autoscalerOptions"]
    assert autoscaler["envFrom"] == [PROXY]
    assert MOUNT in autoscaler["volumeMounts"]
    assert [one for one in autoscaler["env"] if one["name"] == "TOKEN"] == [{"name": "TOKEN", "value": "own"}]
    assert {"name": "A", "value": "default"} in autoscaler["env"]
    (fetcher,) = pods(objects)["head"]["spec"]["initContainers"]
    assert fetcher["envFrom"] == [PROXY, OWN]
    assert TOKEN in fetcher["env"]
    assert [one for one in fetcher["env"] if one["name"] == "B"] == [{"name": "B", "value": "own"}]


def test_a_mount_of_the_autoscaler_needs_its_volume_in_the_head(tmp_path: Path) -> None:
    file = tmp_path / "values.json"
    values = {
        "mode": "cluster",
        "podDefaults": {"extraVolumes": [VOLUME], "extraVolumeMounts": [MOUNT]},
        "head": {"extraVolumes": [], "extraVolumeMounts": []},
    }
    file.write_text(json.dumps(values), encoding="utf-8")
    run = helm("helm4", "template", "demo", CHART, "--values", file, check=False)
    assert "autoscaling.extraVolumeMounts names certificates, and the pod has no such volume" in run.stderr


@pytest.mark.parametrize("field", ["podDefaults.env", "serve.fetch.env"])
@pytest.mark.parametrize("name", ["TARGET", "PARTIAL"])
def test_no_variable_moves_the_weights(field: str, name: str) -> None:
    told = refusal("helm4", "serve.checkpoint=hf://org/name", f"{field}.{name}=/elsewhere")
    assert f"{field} sets {name}, by which the chart says where the weights go" in told
    extra = (f"{field.removesuffix('.env')}.extraEnv[0].{part}" for part in (f"name={name}", "value=/a"))
    told = refusal("helm4", "serve.checkpoint=hf://org/name", *extra)
    assert f"xtraEnv sets {name}, by which" in told


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("said_by", ["podDefaults", "workerDefaults", "workerGroups.trunk"])
def test_a_list_is_extended_where_the_values_say_so(version: str, said_by: str, tmp_path: Path) -> None:
    defaults = {"tolerations": [TAINT], "envFrom": [PROXY], "extraEnv": [TOKEN, {"name": "A", "value": "1"}]}
    own = {"tolerations": [OWN_TAINT], "envFrom": [OWN], "extraEnv": [{"name": "A", "value": "2"}]}
    values: dict[str, Any] = {"podDefaults": defaults, "workerGroups": {"trunk": own}}
    section = values
    for part in said_by.split("."):
        section = section.setdefault(part, {})
    section["extend"] = ["tolerations", "extraEnv"]
    found = pods(made(version, tmp_path, values))
    trunk, expert = (found[name]["spec"] for name in ("trunk", "expert"))
    assert trunk["tolerations"] == [TAINT, OWN_TAINT]
    assert trunk["containers"][0]["envFrom"] == [OWN], "a list that is not named takes the other's place"
    env = trunk["containers"][0]["env"]
    assert TOKEN in env and [one["value"] for one in env if one["name"] == "A"] == ["2"]
    assert expert["tolerations"] == [TAINT]


def test_a_section_may_take_the_place_of_lists_that_are_extended_elsewhere(tmp_path: Path) -> None:
    values = {
        "podDefaults": {"extend": ["tolerations"], "tolerations": [TAINT]},
        "head": {"extend": [], "tolerations": [OWN_TAINT]},
        "workerGroups": {"trunk": {"tolerations": []}},
        "tests": {"tolerations": [OWN_TAINT]},
    }
    found = pods(made("helm4", tmp_path, values))
    assert found["head"]["spec"]["tolerations"] == [OWN_TAINT]
    assert found["trunk"]["spec"]["tolerations"] == [TAINT]
    assert found["test"]["spec"]["tolerations"] == [TAINT, OWN_TAINT]


def test_a_volume_may_be_mounted_at_two_paths(tmp_path: Path) -> None:
    other = {**MOUNT, "mountPath": "/etc/ssl/other"}
    writable = {"name": "certificates", "mountPath": "/etc/ssl/own"}
    values = {
        "podDefaults": {
            "extend": ["extraVolumeMounts"],
            "extraVolumes": [VOLUME],
            "extraVolumeMounts": [MOUNT],
        },
        "workerGroups": {
            "trunk": {"extraVolumeMounts": [other]},
            "expert": {"extraVolumeMounts": [writable]},
        },
    }
    found = pods(made("helm4", tmp_path, values))
    mounts = {
        name: [one for one in pod["spec"]["containers"][0]["volumeMounts"] if one["name"] == "certificates"]
        for name, pod in found.items()
    }
    assert mounts["trunk"] == [MOUNT, other]
    assert mounts["expert"] == [writable]
    assert mounts["head"] == [MOUNT]


def test_a_list_that_cannot_be_extended_is_refused() -> None:
    assert "extend" in refusal("helm4", "mode=cluster", "podDefaults.extend[0]=nodeSelector")


HOSTS = ("mode=serve", "serve.checkpoint=/a", "workerGroups.expert.groupSpec.numOfHosts=4")
WORKERS = ("mode=train", "workerGroups.trunk.groupSpec.numOfHosts=3", "workerGroups.trunk.minReplicas=2")


def arguments(*settings: str) -> str:
    given = [part for setting in settings for part in ("--set", setting)]
    return helm("helm4", "template", "demo", CHART, *given).stdout


@pytest.mark.parametrize(
    ("settings", "fits", "beyond", "why"),
    [
        # 8 replicas of 4 pods.
        (HOSTS, "serve.config.cluster.expert_hosts=32", "serve.config.cluster.expert_hosts=33", "(32)"),
        # 2 replicas of 3 pods with 2 CPUs each.
        (WORKERS, "train.config.training.workers=12", "train.config.training.workers=13", "begin with 12"),
        # 4 replicas of 3 pods with 2 CPUs each.
        (
            ("serve.checkpoint=/a", "workerGroups.trunk.groupSpec.numOfHosts=3"),
            "serve.config.serving.replicas=24",
            "serve.config.serving.replicas=25",
            "room for (24",
        ),
        (
            (
                *WORKERS,
                "workerGroups.trunk.maxReplicas=2",
                "train.config.training.gpus_per_worker=1",
                "workerGroups.trunk.resources.limits.nvidia\\.com/gpu=1",
            ),
            "train.config.training.workers=6",
            "train.config.training.workers=7",
            "ever have (6)",
        ),
        (WORKERS, "workerGroups.trunk.minAvailable=6", "workerGroups.trunk.minAvailable=7", "(6)"),
    ],
)
def test_several_hosts_of_a_replica_are_counted(
    settings: tuple[str, ...], fits: str, beyond: str, why: str
) -> None:
    assert arguments(*settings, fits)
    assert why in refusal("helm4", *settings, beyond)


@pytest.mark.parametrize("version", HELMS)
def test_a_budget_lets_one_pod_of_all_hosts_end(version: str, tmp_path: Path) -> None:
    group = {"groupSpec": {"numOfHosts": 3}, "minReplicas": 2}
    objects = made(version, tmp_path, {"workerGroups": {"trunk": group}})
    least = {
        one["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]: one["spec"]["minAvailable"]
        for one in objects
        if one["kind"] == "PodDisruptionBudget"
    }
    assert least["trunk"] == 5


def test_hosts_start_on_all_pods_of_a_replica(tmp_path: Path) -> None:
    objects = made("helm4", tmp_path, {"workerGroups": {"expert": {"groupSpec": {"numOfHosts": 4}}}})
    (service,) = (one for one in objects if one["kind"] == "RayService")
    assert "expert_hosts: 8" in service["spec"]["serveConfigV2"], "2 replicas of 4 pods"
