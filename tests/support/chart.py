"""Renders of the chart by both helms; `python tests/support/chart.py` rewrites the golden renders."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "raymoe"
TOOLS = ROOT / ".tools"
GOLDEN = ROOT / "tests" / "golden" / "chart"
KUBE = ROOT.parent / "shared" / "kube"
"""KubeRay's schemas and an API server's double, where they lie beside the checkout."""

HELMS = ("helm3", "helm4")
SETS = sorted(file.stem for file in (CHART / "ci").glob("*.yaml"))
NO_KUBE = (
    "KubeRay's schemas are not beside the checkout (../shared/kube); they are where the project is developed"
)

Manifest = dict[str, Any]


def helm(version: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a helm that `make chart-test` has fetched."""
    command = [str(TOOLS / version / "helm"), *map(str, arguments)]
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=120)


def render(version: str, values: str) -> list[Manifest]:
    """All objects of a value set, the tests' pod included."""
    file = CHART / "ci" / f"{values}.yaml"
    return manifests(helm(version, "template", "demo", CHART, "--namespace", "moe", "--values", file).stdout)


def manifests(text: str) -> list[Manifest]:
    """The objects of a rendered text, in a fixed order, the random token replaced."""
    found = [one for one in yaml.load_all(text, Loader=yaml.CSafeLoader) if one]
    for one in found:
        if one["kind"] == "Secret":
            one["data"] = dict.fromkeys(one["data"], "random")
    return sorted(found, key=lambda one: (one["kind"], one["metadata"]["name"]))


def refusal(version: str, *settings: str) -> str:
    """The error that helm prints for values that it refuses; empty when it takes them.

    Args:
        settings: `name=value`, or `name:=value` of a value in JSON, as a fraction has to be.
    """
    given: list[str] = []
    for setting in settings:
        name, json, value = setting.partition(":=")
        given += ["--set-json", f"{name}={value}"] if json else ["--set", setting]
    run = helm(version, "template", "demo", CHART, *given, check=False)
    return run.stderr if run.returncode else ""


def clusters(objects: list[Manifest]) -> Iterator[Manifest]:
    """The spec of each RayCluster, alone or within a RayService or RayJob."""
    fields = {"RayCluster": "", "RayService": "rayClusterConfig", "RayJob": "rayClusterSpec"}
    for one in objects:
        if one["kind"] in fields:
            yield one["spec"][fields[one["kind"]]] if fields[one["kind"]] else one["spec"]


def pods(objects: list[Manifest]) -> dict[str, Manifest]:
    """Every pod that these objects create, by its role."""
    found: dict[str, Manifest] = {}
    for spec in clusters(objects):
        found["head"] = spec["headGroupSpec"]["template"]
        found |= {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    for one in objects:
        if one["kind"] == "RayJob" and "submitterPodTemplate" in one["spec"]:
            found["submitter"] = one["spec"]["submitterPodTemplate"]
        if one["kind"] == "Pod":
            found["test"] = one
    return {
        name: {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": "moe",
                "labels": pod["metadata"]["labels"],
                "annotations": pod["metadata"].get("annotations", {}),
            },
            "spec": pod["spec"],
        }
        for name, pod in found.items()
    }


def golden(values: str) -> Path:
    """The file with a value set's golden render."""
    return GOLDEN / f"{values}.yaml"


def main() -> None:
    """Write all golden renders."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for values in SETS:
        text = yaml.safe_dump_all(render("helm4", values), sort_keys=True, width=110)
        golden(values).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
