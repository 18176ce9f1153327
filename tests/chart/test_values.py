"""Files generated from values.yaml are up to date and closed, and charted series exist; without helm."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from helm.generate import generated
from helm.schema import values_schema
from helm.values import read_values
from jobs.api.serving_metrics import EngineFigures, ExpertFigures, ServingMetrics
from support.chart import CHART, ROOT, SETS

SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
VALUES = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))


def test_schema_and_list_of_values_are_fresh() -> None:
    for file, text in generated().items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name} is stale; run python -m helm.generate"


def test_the_defaults_and_all_value_sets_fit() -> None:
    validator = Draft7Validator(SCHEMA)
    Draft7Validator.check_schema(SCHEMA)
    validator.validate(VALUES)
    for name in SETS:
        validator.validate(yaml.safe_load((CHART / "ci" / f"{name}.yaml").read_text(encoding="utf-8")))
    assert len(SETS) >= 12


def _sections(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every mapping of values.yaml with a fixed set of keys."""
    free = {leaf.path for leaf in read_values().leaves() if not leaf.entries}
    yield path
    for name, value in values.items():
        if isinstance(value, dict) and (*path, name) not in free and (*path, name) != ("workerGroups",):
            yield from _sections(value, (*path, name))


@pytest.mark.parametrize(
    "path",
    [
        *_sections(VALUES),
        ("workerGroups", "expert"),
        ("workerGroups", "mine"),
        ("serve", "config"),
        ("serve", "config", "serving"),
        ("serve", "config", "cluster", "autoscaling"),
        ("train", "config"),
        ("train", "config", "model"),
        ("head", "resources"),
        ("checkpoints", "volume"),
        ("tls", "certManager", "issuerRef"),
    ],
    ids=".".join,
)
def test_a_typo_is_an_error(path: tuple[str, ...]) -> None:
    values: dict[str, Any] = {"typo": 1}
    for name in reversed(path):
        values = {name: values}
    assert not Draft7Validator(SCHEMA).is_valid(values)


def test_the_generator_refuses_what_says_nothing(tmp_path: Any) -> None:
    file = tmp_path / "values.yaml"
    for text, why in (
        ("a: 1\n", "no description"),
        ("# -- What it is.\na: {}\n", "what may be in it"),
        ("# -- What it is.\na: null\n", "which type"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=why):
            values_schema(read_values(file))


def _exported() -> set[str]:
    """Names of all series that `/metrics` can show."""
    metrics = ServingMetrics("tiny")
    figures = {name: 1 for name in EngineFigures.__dataclass_fields__}
    metrics.engines = {"0": EngineFigures(**figures)}
    metrics.experts = ExpertFigures(wanted=1, hosts=1, replicas=1, in_flight=0, balancedness=1.0)
    metrics.finished("stop")
    return set(re.findall(r"^(raymoe_\w+)\{", metrics.exposition().decode(), flags=re.MULTILINE))


@pytest.mark.parametrize("file", ["dashboards/raymoe.json", "templates/prometheusrule.yaml"])
def test_what_is_charted_and_alerted_on_is_exported(file: str) -> None:
    text = (CHART / file).read_text(encoding="utf-8")
    named = set(re.findall(r"\braymoe_[a-z0-9_]+\b", text))
    assert len(named) >= 5
    assert named <= _exported()


def test_the_versions_are_those_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert f'version = "{chart["appVersion"]}"' in project
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"\nray=={VALUES['rayVersion']}\n" in pinned


def test_what_the_comparison_with_other_charts_names_are_values() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    table = text.partition("## Compared with other charts\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    names = {".".join(leaf.path[:depth]) for leaf in read_values().leaves() for depth in range(1, 5)}
    for *others, ours in rows:
        assert any("`" in one for one in others[1:]), f"{others[0].strip()}: no other chart has it"
        named = re.findall(r"`([^`]+)`", ours.partition(";")[0])
        assert named and set(named) <= names, f"{others[0].strip()}: {sorted(set(named) - names)}"
    assert len(rows) >= 40
