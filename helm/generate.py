"""Write values.schema.json and the list of values: `python -m helm.generate`, from the project's root."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helm.reference import inserted, reference
from helm.schema import values_schema
from helm.values import CHART, read_values

DOCUMENT = Path(__file__).parents[1] / "docs" / "kubernetes.md"


def generated() -> dict[Path, str]:
    """The contents of the generated files."""
    root = read_values()
    document = DOCUMENT.read_text(encoding="utf-8")
    return {
        CHART / "values.schema.json": _schema_text(values_schema(root)),
        DOCUMENT: inserted(document, reference(root)),
    }


def _schema_text(schema: Mapping[str, Any]) -> str:
    """A schema as JSON, with a line for each definition."""
    body = json.dumps({name: part for name, part in schema.items() if name != "definitions"}, indent=1)
    lines = [f"  {json.dumps(name)}: {json.dumps(part)}" for name, part in schema["definitions"].items()]
    return body.removesuffix("\n}") + ',\n "definitions": {\n' + ",\n".join(lines) + "\n }\n}\n"


def main() -> None:
    """Write the generated files."""
    for file, text in generated().items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
