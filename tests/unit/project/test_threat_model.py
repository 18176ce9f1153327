"""Every line of the tables of docs/security.md that claims something names a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "security.md"
COLUMN = "shown by"


def claims() -> list[tuple[str, str]]:
    """First and last cell of each row of the tables whose last column is `shown by`."""
    found, taken = [], False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if not line.startswith("|"):
            taken = False
        elif cells[-1] == COLUMN:
            taken = True
        elif taken and not set(line) <= set("|- "):
            found.append((cells[0], cells[-1]))
    return found


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("claim", "shown"), claims())
def test_a_claim_names_a_test_that_exists(claim: str, shown: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", shown)
    assert named or shown == "the same" or shown.startswith("nothing"), f"{claim}: {shown!r} names no test"
    for file, test in named:
        assert (ROOT / file).exists(), f"{claim}: there is no {file}"
        if test:
            assert test in functions_of(ROOT / file), f"{claim}: {file} has no {test}"


def test_the_threat_model_is_such_a_table() -> None:
    _, _, rest = PAGE.read_text(encoding="utf-8").partition("## Threat model\n")
    header = next(line for line in rest.splitlines() if line.startswith("|"))
    assert header.strip("| ").split(" | ")[-1] == COLUMN
    assert len(claims()) > 10
