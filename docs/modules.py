"""The list of modules in docs/modules.md, from their docstrings: `python -m docs.modules` writes it."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "modules.md"
PACKAGES = (
    "kernels",
    "protos",
    "cluster",
    "model",
    "channels",
    "engine",
    "actors",
    "jobs",
    "benchmarks",
    "helm",
    "docs",
)  # from the lowest layer to the highest
_GENERATED = ("_pb2", "_pb2_grpc")
_HEAD = """# Modules

Find the file for a task here, then open it. Each line is the first line of the module's own docstring.
Packages stand from the lowest layer to the highest; a module imports from its own layer and the ones
before it ([CONTRIBUTING.md](../CONTRIBUTING.md#layers)). [architecture.md](architecture.md)
tells how they work together.

`make docs` generates this page.
"""


def page() -> str:
    """The text of docs/modules.md."""
    errors = f"## errors.py\n\n{_summary(ROOT / 'errors.py')}\n"
    return "\n".join([_HEAD, errors, *(_package(ROOT / name) for name in PACKAGES)])


def _package(folder: Path) -> str:
    """One package's heading and modules, then those of the packages in it."""
    name = folder.relative_to(ROOT).as_posix()
    files = sorted(file for file in folder.iterdir() if _listed(file))
    lines = [f"##{'#' * name.count('/')} {name}/", "", _summary(folder / "__init__.py"), ""]
    if files:
        lines += ["| module | |", "|---|---|"]
        lines += [f"| [`{file.name}`](../{name}/{file.name}) | {_cell(file)} |" for file in files] + [""]
    inner = sorted(file.parent for file in folder.glob("*/__init__.py"))
    return "\n".join([*lines, *map(_package, inner)])


def _listed(file: Path) -> bool:
    return (
        file.suffix in (".py", ".proto") and file.name != "__init__.py" and not file.stem.endswith(_GENERATED)
    )


def _cell(file: Path) -> str:
    return _summary(file).replace("|", "\\|")


def _summary(file: Path) -> str:
    """The first line of a module's docstring, or the first sentence of a protocol file's opening comment."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".proto":
        comment = itertools.takewhile(lambda line: line.startswith("//"), text.splitlines())
        return (
            " ".join(line.removeprefix("//").strip() for line in comment).partition(". ")[0].rstrip(".") + "."
        )
    docstring = ast.get_docstring(ast.parse(text))
    if not docstring:
        raise ValueError(f"{file.relative_to(ROOT)} has no docstring: say in one line what is in it")
    return docstring.partition("\n")[0]


def main() -> None:
    """Write docs/modules.md."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
