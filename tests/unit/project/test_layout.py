"""Limits of the source tree: sizes of folders, files and functions, and one meaning for each class name."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKAGES = ("actors", "benchmarks", "channels", "cluster", "engine", "helm", "jobs", "kernels", "model")
MODULES_OF_A_FOLDER, LINES_OF_A_FILE, LINES_OF_A_FUNCTION, PARAMETERS = 18, 350, 60, 8

COMMANDS = "an option of a command is a parameter of its function"
EXCEPTIONS = {
    "benchmarks/cli.py:bench_serve": COMMANDS,
    "jobs/cli/job_commands.py:chaos": COMMANDS,
    "jobs/cli/model_commands.py:generate": COMMANDS,
    "jobs/cli/job_commands.py:drain": COMMANDS,
    "jobs/cli/serve_commands.py:serve": COMMANDS,
    "jobs/cli/train_command.py:train": COMMANDS,
}
"""Functions over a limit, each with its reason."""


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_no_folder_has_more_modules_than_one_takes_in() -> None:
    counts = Counter(path.parent.relative_to(ROOT) for path in sources() if path.name != "__init__.py")
    assert {str(folder): n for folder, n in counts.items() if n > MODULES_OF_A_FOLDER} == {}


def test_no_file_is_longer_than_one_reads_at_once() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert {path: n for path, n in lines.items() if n > LINES_OF_A_FILE} == {}


def test_no_function_is_too_long_or_takes_too_much() -> None:
    over = {}
    for path in sources():
        for function in functions(ast.parse(path.read_text())):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > LINES_OF_A_FUNCTION or parameters(function) > PARAMETERS:
                name = f"{path.relative_to(ROOT)}:{function.name}"
                over[name] = f"{length} lines, {parameters(function)} parameters"
    assert over.keys() == EXCEPTIONS.keys(), over


def test_no_two_classes_share_a_name() -> None:
    found = defaultdict(set)
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name.lstrip("_")].add(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}
