"""The chart as a part of another one: switched off, twice in a release, in a namespace of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.chart import CHART, HELMS, Manifest, helm, manifests, pods

pytestmark = pytest.mark.chart


def umbrella(directory: Path, *parts: dict[str, Any]) -> Path:
    """A chart with raymoe as its dependencies."""
    chart = directory / "umbrella"
    shutil.copytree(CHART, chart / "charts" / "raymoe")
    own = {"apiVersion": "v2", "name": "umbrella", "version": "1.0.0"}
    own["dependencies"] = [{"name": "raymoe", "version": "0.1.0", "repository": ""} | part for part in parts]
    (chart / "Chart.yaml").write_text(json.dumps(own), encoding="utf-8")
    return chart


def rendered(version: str, chart: Path, values: dict[str, Any]) -> list[Manifest]:
    """The objects of a chart with these values."""
    file = chart.parent / "values.yaml"
    file.write_text(json.dumps(values), encoding="utf-8")
    return manifests(helm(version, "template", "all", chart, "--values", file, "--namespace", "moe").stdout)


SERVE = {"serve": {"checkpoint": "/checkpoints/demo"}}


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("part", [{}, {"condition": "raymoe.enabled"}], ids=["no condition", "condition"])
def test_a_part_that_is_switched_off_creates_nothing(
    version: str, part: dict[str, Any], tmp_path: Path
) -> None:
    chart = umbrella(tmp_path, part)
    assert len(rendered(version, chart, {"raymoe": SERVE})) > 5
    # Values that the chart would refuse are no matter as long as it is off.
    assert rendered(version, chart, {"raymoe": {"enabled": False, "fullnameOverride": "Not a name"}}) == []


def selects(selector: dict[str, str], pod: Manifest) -> bool:
    return selector.items() <= pod["metadata"]["labels"].items()


@pytest.mark.parametrize("version", HELMS)
def test_two_parts_of_a_release_do_not_select_one_anothers_pods(version: str, tmp_path: Path) -> None:
    chart = umbrella(tmp_path, {"alias": "chat"}, {"alias": "code"})
    objects = rendered(version, chart, {"chat": SERVE, "code": SERVE})
    services = [one for one in objects if one["kind"] == "RayService"]
    assert [one["metadata"]["name"] for one in services] == ["all-chat", "all-code"]
    (chat, code) = (pods([one]) for one in services)
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(names) == len(set(names)), "no object of the one is one of the other"
    selectors = 0
    for one in objects:
        if one["kind"] in ("NetworkPolicy", "PodDisruptionBudget"):
            fields = [part for name, part in one["spec"].items() if name.lower().endswith("selector")]
            selector = fields[0]["matchLabels"]
            own, other = (chat, code) if one["metadata"]["name"].startswith("all-chat") else (code, chat)
            assert any(selects(selector, pod) for pod in own.values())
            assert not any(selects(selector, pod) for pod in other.values())
            selectors += 1
    assert selectors == 8


@pytest.mark.parametrize("version", HELMS)
def test_all_objects_are_in_one_namespace(version: str, tmp_path: Path) -> None:
    chart = umbrella(tmp_path, {})
    for values, namespace in ((SERVE, "moe"), (SERVE | {"namespaceOverride": "answers"}, "answers")):
        objects = rendered(version, chart, {"raymoe": values})
        assert {one["metadata"]["namespace"] for one in objects} == {namespace}
