"""The parts of the soak: complete, and of about the same length."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.soak_parts import MINUTES, soak_part

TESTS = Path(__file__).parents[2]


def test_every_module_with_a_soak_is_in_a_part() -> None:
    marked = {
        file.stem for file in TESTS.rglob("test_*.py") if "pytest.mark." + "soak" in file.read_text("utf-8")
    }
    assert marked == MINUTES.keys()


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_parts_are_of_about_the_same_length(parts: int) -> None:
    length = dict.fromkeys(range(1, parts + 1), 0.0)
    for module, minutes in MINUTES.items():
        length[soak_part(module, parts)] += minutes
    longest = max(MINUTES.values())
    assert max(length.values()) - min(length.values()) <= longest / 2
