"""What the documents name is there, and what is there is named."""

from __future__ import annotations

import re
from pathlib import Path

from jobs.api.schemas import ChatRequest, CompletionRequest

ROOT = Path(__file__).parents[3]


def _listed() -> list[str]:
    """Paths in the list of modules of docs/architecture.md, in its order."""
    _, _, text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("\n## Modules\n")
    package, paths = "", []
    for line in text.splitlines():
        if heading := re.match(r"\*\*(\w+)/\*\*: \S", line):
            package = heading[1]
        elif entry := re.match(r"- `([^`]+)`: \S", line):
            paths.append(f"{package}/{entry[1]}")
        else:
            assert not line.startswith(("-", "**")), f"{line!r} names no module and what it does"
    return paths


def test_the_architecture_lists_every_module_and_no_other() -> None:
    listed = _listed()
    packages = {path.partition("/")[0] for path in listed}
    there = {
        file.relative_to(ROOT).as_posix()
        for package in packages
        for pattern in ("*.py", "*.proto")
        for file in (ROOT / package).rglob(pattern)
        if file.name != "__init__.py" and not file.stem.endswith(("_pb2", "_pb2_grpc"))
    }
    assert sorted(listed) == sorted(there)
    assert packages == {file.parent.name for file in ROOT.glob("*/__init__.py")}


def test_the_parameters_are_those_that_the_server_takes() -> None:
    _, _, text = (
        (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").partition("Against vLLM's server:\n")
    )
    rows = [line.strip("| ").split(" | ") for line in text.strip().split("\n\n")[0].splitlines()[2:]]
    taken, refused = set[str](), set[str]()
    for names, here in rows:
        assert here == "refused" or here.startswith(("supported", "differs: ")), here
        (refused if here == "refused" else taken).update(re.findall(r"`(\w+)`", names))
    assert taken == {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    assert not taken & refused
