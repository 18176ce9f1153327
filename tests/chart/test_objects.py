"""Labels and annotations of every object, and renders that are the same each time."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.chart import CHART, HELMS, KUBE, NO_KUBE, SETS, Manifest, helm, manifests, pods

pytestmark = [
    pytest.mark.chart,
    # KubeRay's schemas are opened by a script that leaves its files to the interpreter.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
COMMON = {"common.example/team": "research", "app.kubernetes.io/part-of": "answers"}
NOTED = {"common.example/owner": "research", "common.example/on-call": "moe"}


def rendered(version: str, base: str, values: dict[str, Any], file: Path) -> list[Manifest]:
    """The objects of a value set with more values."""
    file.write_text(json.dumps(values), encoding="utf-8")
    sets = CHART / "ci" / f"{base}.yaml"
    return manifests(helm(version, "template", "demo", CHART, "--values", sets, "--values", file).stdout)


def selectors(value: Any) -> Iterator[dict[str, str]]:
    """All selectors of labels within an object."""
    if isinstance(value, list):
        for one in value:
            yield from selectors(one)
    if isinstance(value, dict):
        for name, one in value.items():
            if name == "matchLabels":
                yield one
            else:
                yield from selectors(one)


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("base", SETS)
def test_common_labels_and_annotations_are_on_every_object(version: str, base: str, tmp_path: Path) -> None:
    values = {"commonLabels": COMMON, "commonAnnotations": NOTED, "extraObjects": []}
    objects = rendered(version, base, values, tmp_path / "values.yaml")
    assert len(objects) >= 2
    for one in objects:
        where = (one["kind"], one["metadata"]["name"])
        assert COMMON.items() <= one["metadata"]["labels"].items(), where
        assert NOTED.items() <= one["metadata"]["annotations"].items(), where
        assert not any(set(COMMON) & set(selector) for selector in selectors(one)), where
    for name, pod in pods(objects).items():
        assert COMMON.items() <= pod["metadata"]["labels"].items(), name


OBJECTS = {
    "serve": ("serve-full", "RayService"),
    "train": ("train", "RayJob"),
    "cluster": ("cluster", "RayCluster"),
    "auth": ("train", "Secret"),
    "tls": ("serve-full", "Certificate"),
    "serviceAccount": ("train", "ServiceAccount"),
    "checkpoints": ("train", "PersistentVolumeClaim"),
    "networkPolicy": ("train", "NetworkPolicy"),
    "podDisruptionBudget": ("train", "PodDisruptionBudget"),
    "ingress": ("serve-outside", "Ingress"),
    "httpRoute": ("serve-outside", "HTTPRoute"),
    "grpcRoute": ("serve-outside", "GRPCRoute"),
    "monitoring.podMonitor": ("serve-full", "PodMonitor"),
    "monitoring.prometheusRule": ("serve-full", "PrometheusRule"),
    "monitoring.dashboard": ("serve-full", "ConfigMap"),
    "tests": ("train", "Pod"),
    "serve.service": ("serve-full", "Service"),
}
"""Sections with labels and annotations, a value set that has their object, and its kind."""


def sections(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Sections of the values that have labels and annotations."""
    fields = schema.get("properties", {})
    if {"labels", "annotations"} <= set(fields):
        yield path
    for name, field in fields.items():
        yield from sections(field, f"{path}.{name}".lstrip("."))


def test_the_list_of_objects_is_whole() -> None:
    assert set(sections(SCHEMA)) == set(OBJECTS)


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("section", OBJECTS)
def test_an_object_has_labels_of_its_own_which_win(version: str, section: str, tmp_path: Path) -> None:
    base, kind = OBJECTS[section]
    own = {"common.example/team": "", "own": "yes"}  # an empty value wins as well
    values: dict[str, Any] = {"labels": own, "annotations": {"common.example/owner": "", "own": "yes"}}
    for name in reversed(section.split(".")):
        values = {name: values}
    values |= {"commonLabels": COMMON, "commonAnnotations": NOTED}
    objects = rendered(version, base, values, tmp_path / "values.yaml")
    if kind == "Service":
        (service,) = (one["spec"]["serveService"] for one in objects if one["kind"] == "RayService")
        objects.append({"kind": "Service", "metadata": service["metadata"]})
    marked = [one for one in objects if one["metadata"].get("labels", {}).get("own") == "yes"]
    assert kind in {one["kind"] for one in marked}
    for one in marked:
        labels, annotations = one["metadata"]["labels"], one["metadata"]["annotations"]
        assert labels["common.example/team"] == "" and labels["app.kubernetes.io/part-of"] == "answers"
        assert annotations["common.example/owner"] == "" and annotations["own"] == "yes"
        assert annotations["common.example/on-call"] == "moe"


def text_of(version: str, *settings: str) -> str:
    given = [part for setting in settings for part in ("--set", setting)]
    return helm(version, "template", "demo", CHART, *given).stdout


EXISTING = ("auth.existingSecret=token", "tls.existingSecret=member")
MANAGED = ("auth.existingSecret=token", "tls.certManager.enabled=true")


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("mode", [("serve.checkpoint=/a",), ("mode=train",), ("mode=cluster",)], ids=" ".join)
@pytest.mark.parametrize("secrets", [EXISTING, MANAGED], ids=" ".join)
def test_two_renders_with_existing_secrets_are_the_same(
    version: str, mode: tuple[str, ...], secrets: tuple[str, ...]
) -> None:
    assert text_of(version, *mode, *secrets) == text_of(version, *mode, *secrets)


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("left", [0, 1])
def test_two_renders_with_secrets_of_the_chart_differ(version: str, left: int) -> None:
    settings = ("serve.checkpoint=/a", EXISTING[left])
    assert text_of(version, *settings) != text_of(version, *settings), "the documents tell users so"


NOT_TAKEN = {
    "RayService": {
        "excludeHeadPodFromServeSvc": "the interface is on the head pod",
    },
    "RayJob": {
        "clusterSelector": "a job has a cluster of its own; `mode: cluster` takes other jobs",
    },
    "RayCluster": {},
}
"""Fields that no value sets, and why."""


def properties(kind: str) -> set[str]:
    """Fields of the spec of one of KubeRay's resources."""
    spec = importlib.util.spec_from_file_location("kuberay_crds", KUBE / "kuberay_crds.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return set(module.load()[("ray.io/v1", kind)].schema["properties"]["spec"]["properties"])


@pytest.mark.skipif(not KUBE.is_dir(), reason=NO_KUBE)
@pytest.mark.parametrize(
    ("kind", "base", "more"),
    [
        ("RayService", "serve-full", "serviceSpec"),
        ("RayJob", "train", "jobSpec"),
        ("RayCluster", "cluster", ""),
    ],
)
def test_every_field_that_kuberay_takes_can_be_set(kind: str, base: str, more: str, tmp_path: Path) -> None:
    section = base.partition("-")[0]
    values: dict[str, Any] = {section: {"suspend": True, "managedBy": "kueue.x-k8s.io/multikueue"}}
    if kind == "RayJob":
        both = {"onSuccess": {"policy": "DeleteCluster"}, "onFailure": {"policy": "DeleteCluster"}}
        values[section] |= {"activeDeadlineSeconds": 60, "deletionStrategy": both}
    objects = rendered("helm4", base, values, tmp_path / "values.yaml")
    (found,) = (set(one["spec"]) for one in objects if one["kind"] == kind)
    passed = set(SCHEMA["properties"][more]["properties"]) if more else set()
    if kind == "RayCluster":
        passed = properties(kind) - found  # by clusterSpec
    assert properties(kind) == found | passed | set(NOT_TAKEN[kind])
    assert not passed & found, "a field that passes through is none of the chart's own"


OTHERS = """
suspend managedBy replicas scaleStrategy workersToDelete
clusterIP nodePort ipFamilies ipFamilyPolicy loadBalancerIP healthCheckNodePort
"""


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("base", ["serve", "train", "cluster"])
def test_fields_of_others_are_not_rendered(version: str, base: str, tmp_path: Path) -> None:
    """Kueue sets `suspend`, MultiKueue's users `managedBy`, Ray's autoscaler and Kubernetes the others."""
    objects = rendered(version, base, {}, tmp_path / "values.yaml")
    (resource,) = (one for one in objects if one["apiVersion"].startswith("ray.io/"))
    assert not set(_keys(resource["spec"])) & set(OTHERS.split())


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for one in value:
            yield from _keys(one)
    if isinstance(value, dict):
        for name, one in value.items():
            yield name
            yield from _keys(one)
