"""The cache of compiled functions notices a change of any source file of their package."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

CALLEE = "from kernels.compiled import compiled\n\n@compiled\ndef inner(x):\n    return x + {}\n"
CALLER = (
    "from kernels.compiled import compiled\nfrom small_kernels.callee import inner\n\n"
    "@compiled\ndef outer(x):\n    return 10 * inner(x)\n"
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "small_kernels"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "caller.py").write_text(CALLER)
    (folder / "callee.py").write_text(CALLEE.format(1))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "small_kernels"]:
        del sys.modules[name]


def _import_again() -> ModuleType:
    _forget()
    importlib.invalidate_caches()
    return importlib.import_module("small_kernels.caller")


def test_a_changed_callee_in_another_file_changes_the_callers_result(package: Path) -> None:
    first = _import_again()
    assert first.outer(1) == 20
    assert first.outer.stats.cache_misses
    same = _import_again()
    assert same.outer(1) == 20
    assert same.outer.stats.cache_hits and not same.outer.stats.cache_misses
    (before,) = (package / "__pycache__").glob("compiled-*")

    (package / "callee.py").write_text(CALLEE.format(2))
    changed = _import_again()
    assert changed.outer(1) == 30
    assert before.is_dir(), "a process of the other sources may be running"

    yesterday = time.time() - 25 * 3600
    os.utime(before, (yesterday, yesterday))
    (package / "callee.py").write_text(CALLEE.format(3))
    assert _import_again().outer(1) == 40
    assert len(list((package / "__pycache__").glob("compiled-*"))) == 2
    assert not before.exists(), "old code of other sources was not removed"
