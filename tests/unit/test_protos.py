"""The generated code that is checked in is what the .proto files give."""

from __future__ import annotations

from pathlib import Path

import pytest

from protos import generate


def test_generated_code_is_current(tmp_path: Path) -> None:
    missing = generate.missing_tools()
    if missing:
        pytest.skip(f"needs {' '.join(missing)}, which hold protobuf back: run it where `make protos` runs")
    generate.generate(tmp_path)
    for name in generate.generated_files():
        made, kept = tmp_path / "protos" / name, generate.ROOT / "protos" / name
        assert made.read_text() == kept.read_text(), f"{name} is stale: python -m protos.generate"


def test_every_proto_is_generated() -> None:
    found = {path.stem for path in (generate.ROOT / "protos").glob("*.proto")}
    assert found == set(generate.MESSAGES)
    for name in generate.generated_files():
        assert (generate.ROOT / "protos" / name).is_file()
