"""What the documents name is there, and what is there is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from pydantic import BaseModel

from docs import modules
from helm.values import read_values
from jobs.api.neutral_values import KNOWN
from jobs.api.request_bodies import ChatRequest, CompletionRequest
from jobs.cli.app import app
from jobs.config.run_config import RunConfig
from jobs.serving.config import ServeConfig

ROOT = modules.ROOT
# Pages that speak of the project as it is; the changelog speaks of the past as well.
PAGES = sorted(
    file.relative_to(ROOT).as_posix()
    for file in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
    if file.name != "CHANGELOG.md"
)


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _defines(module: str, name: str) -> bool:
    """Whether a module's source, or its stub, has a class or function of that name, or exports it."""
    files = [ROOT / f"{module.replace('.', '/')}{suffix}" for suffix in (".py", ".pyi")]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files if file.exists())
    defined = re.search(rf"^(?:class|def|async def) {name}\b", source, re.MULTILINE)
    return bool(defined) or f'"{name}"' in source.partition("\n__all__ = ")[2]


def test_the_list_of_modules_is_the_generated_one() -> None:
    assert modules.PAGE.read_text(encoding="utf-8") == modules.page(), "run `make docs`"


def test_the_list_of_modules_has_every_package() -> None:
    assert sorted(modules.PACKAGES) == sorted(file.parent.name for file in ROOT.glob("*/__init__.py"))


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|proto|md|toml|tpl))(?:::\w+)?`", _text(page)))
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _text(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            broken.append(target)
    assert not broken


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_names_that_a_page_gives_as_module_and_name_exist(page: str) -> None:
    text, packages = _text(page), "|".join(modules.PACKAGES)
    named = re.findall(rf"`((?:{packages})\.[\w.]+)\.([A-Z]\w+)`", text)
    named += re.findall(r"import_path: ([\w.]+):(\w+)", text)
    for module, names in re.findall(rf"^from ((?:{packages})\.[\w.]+) import (.+)$", text, re.MULTILINE):
        named += [(module, name) for name in names.split(", ")]
    assert not [f"{module}.{name}" for module, name in named if not _defines(module, name)]


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_that_a_page_names_exist(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", _text("Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^ {4})make ([\w-]+)", _text(page), re.MULTILINE)) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_a_page_names_exist_with_their_options(page: str) -> None:
    commands = dict(_commands(typer.main.get_command(app)))
    for line in _command_lines(_text(page)):
        words = line.split()
        name = max((name for name in commands if f"{line} ".startswith(f"{name} ")), key=len, default="")
        assert name, f"{line!r} is no command"
        options = {re.split(r"[=\]`]", word)[0] for word in words if re.match(r"--[a-z]", word)}
        assert options <= commands[name], line


def _commands(command: click.Command, prefix: str = "") -> Iterator[tuple[str, set[str]]]:
    """Names of all commands, and the options of each."""
    options = {
        option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    yield prefix.strip(), {*options, "--help"}
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, f"{prefix} {name}")


def _command_lines(text: str) -> Iterator[str]:
    """What follows `raymoe` in the commands of a page, in blocks of code and between backticks."""
    joined = re.sub(r" \\\n\s+", " ", text)
    for line in re.findall(r"(?:^ {4}|`|-- )raymoe ([a-z][^\n`#]*)", joined, re.MULTILINE):
        yield re.sub(r"\s*[|>…].*$", "", line).strip()


@pytest.mark.parametrize("page", PAGES)
def test_fields_of_the_configuration_that_a_page_names_exist(page: str) -> None:
    names = "|".join(_sections())
    text = re.sub(r"^ +\$ .*$", "", _text(page), flags=re.MULTILINE)  # a prompt shows what is refused, too
    named = re.findall(rf"(?:`|--set )({names})\.((?!py`)[a-z_0-9]+)[`=]", text)
    missing = {f"{section}.{name}" for section, name in named if name not in _sections()[section]}
    # The chart has a section `cluster` of its own.
    of_the_chart = {leaf.name for leaf in read_values().leaves()} if page == "docs/kubernetes.md" else set()
    assert not missing - of_the_chart


def _sections() -> dict[str, set[str]]:
    """The sections of a run's and a deployment's configuration, and the fields of each."""
    sections: dict[str, set[str]] = {}
    for model in (RunConfig, ServeConfig):
        for section, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                sections.setdefault(section, set()).update(field.annotation.model_fields)
    return sections


def test_the_glossary_gives_every_word_once_with_what_carries_it() -> None:
    rows = re.findall(r"^\| \*\*(.+?)\*\* \| (.+?) \| (.*?) ?\|$", _text("docs/glossary.md"), re.MULTILINE)
    words = [word for word, _, _ in rows]
    assert len(words) > 50 and len(set(words)) == len(words)
    carriers = [name for _, _, carrier in rows for name in re.findall(r"`([^`]+)`", carrier)]
    split = [name.rpartition(".") for name in carriers]
    assert not [f"{module}.{name}" for module, _, name in split if not _defines(module, name)]


def test_the_page_on_locks_has_every_lock_and_no_other() -> None:
    kinds = r"(?:threading|asyncio)\.(?:R?Lock|Condition|Semaphore)\b"
    made = re.compile(rf"(\w+)(?:: [\w.]+)? = (?:field\(default_factory=)?{kinds}")
    there = {
        (file.relative_to(ROOT).as_posix(), name)
        for package in modules.PACKAGES
        for file in (ROOT / package).rglob("*.py")
        for name in made.findall(file.read_text(encoding="utf-8"))
    }
    listed = re.findall(r"^\| `([\w/]+\.py)` `(\w+)` \|", _text("docs/locks.md"), re.MULTILINE)
    assert sorted(listed) == sorted(there)


def test_the_parameters_are_those_that_the_server_takes() -> None:
    _, _, text = _text("docs/serving.md").partition("Against vLLM's server:\n")
    rows = [line.strip("| ").split(" | ") for line in text.strip().split("\n\n")[0].splitlines()[2:]]
    taken, neutral = set[str](), set[str]()
    for names, here in rows:
        known = here in ("neutral values alone", "without effect")
        assert known or here.startswith(("supported", "differs: ")), here
        (neutral if known else taken).update(re.findall(r"`(\w+)`", names))
    assert taken == {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    assert neutral == KNOWN - taken
