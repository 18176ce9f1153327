"""The project's own files: one version everywhere, a licence, a changelog that knows the release."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import yaml
from typer.testing import CliRunner

from jobs.cli.app import app

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = PROJECT["version"]


def test_the_command_prints_the_version_of_pyproject() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"raymoe {VERSION}\n"


def test_the_image_has_the_version_of_pyproject_as_its_tag() -> None:
    commands = subprocess.run(
        ["make", "--dry-run", "image"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"--tag (\S+)", commands) == [f"raymoe:{VERSION}"]


def test_the_chart_deploys_the_version_of_pyproject() -> None:
    chart = yaml.safe_load((ROOT / "helm" / "raymoe" / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == VERSION


def test_images_that_the_documents_and_the_charts_values_name_have_the_version_of_pyproject() -> None:
    files = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "helm" / "raymoe" / "ci").glob("*.yaml"),
    ]
    named = {
        tag
        for file in files
        for tag in re.findall(r"/raymoe(?::|, tag: )(\d[\w.]*)", file.read_text(encoding="utf-8"))
    }
    assert named == {VERSION}


def test_the_changelog_has_an_entry_for_the_version_of_pyproject_and_one_for_what_comes() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)[:2] == ["Unreleased", VERSION]


def test_the_licence_is_the_one_that_pyproject_names() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    for name in PROJECT["license-files"]:
        assert "Apache License\n" in (ROOT / name).read_text(encoding="utf-8")
        assert f"!{name}" in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


def test_issue_templates_are_forms() -> None:
    forms = [file for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if file.stem != "config"]
    assert {file.stem for file in forms} == {"bug", "feature"}
    for file in forms:
        form = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert form.keys() >= {"name", "description", "body"}
        assert any(field.get("validations", {}).get("required") for field in form["body"])
