"""Values that KubeRay's operator would refuse, or that cannot work, are refused with one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.chart import CHART, HELMS, ROOT, helm, refusal
from support.refused_values import of_objects, of_pods, of_sizes_and_names
from support.refused_values.of_sizes_and_names import CLUSTER, FIXED, LONG, SERVE, TRAIN

pytestmark = pytest.mark.chart

TABLES = (of_sizes_and_names, of_objects, of_pods)
REFUSED = [one for table in TABLES for one in table.REFUSED]
UNFIT = [one for table in TABLES for one in table.UNFIT]
TAKEN = [one for table in TABLES for one in table.TAKEN]


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize(("settings", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_is_refused_in_a_sentence(version: str, settings: tuple[str, ...], why: str) -> None:
    assert why in refusal(version, *settings)


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize(("setting", "name"), UNFIT)
def test_what_the_schema_refuses_is_named(version: str, setting: str, name: str) -> None:
    # helm 3 and helm 4 write names differently, with dots or with slashes.
    assert name in refusal(version, *SERVE, setting).replace("/", ".")


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("settings", TAKEN, ids=" ".join)
def test_what_works_is_taken(version: str, settings: tuple[str, ...]) -> None:
    assert refusal(version, *settings) == ""


@pytest.mark.parametrize("version", HELMS)
def test_the_examples_of_the_document_are_taken(version: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```yaml\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(examples) >= 2
    file = tmp_path / "values.yaml"
    for example in examples:
        file.write_text(example, encoding="utf-8")
        helm(version, "template", "demo", CHART, "--set", *SERVE, "--values", file)


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("base", [SERVE, TRAIN, CLUSTER, FIXED])
def test_what_the_refusals_begin_with_is_taken(version: str, base: tuple[str, ...]) -> None:
    assert refusal(version, *base) == ""
    assert refusal(version, *base, f"fullnameOverride={LONG[1:]}") == ""


@pytest.mark.parametrize("version", HELMS)
def test_a_typo_is_refused(version: str) -> None:
    assert "workerGroup" in refusal(version, *SERVE, "workerGroups.expert.maxReplica=9")
