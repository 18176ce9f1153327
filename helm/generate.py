"""Write values.schema.json and the list of values: `python -m helm.generate`, from the project's root."""

from __future__ import annotations

import json
from pathlib import Path

from helm.reference import inserted, reference
from helm.schema import values_schema
from helm.values import CHART, read_values

DOCUMENT = Path(__file__).parents[1] / "docs" / "kubernetes.md"


def generated() -> dict[Path, str]:
    """The contents of the generated files."""
    root = read_values()
    document = DOCUMENT.read_text(encoding="utf-8")
    return {
        CHART / "values.schema.json": json.dumps(values_schema(root), indent=1) + "\n",
        DOCUMENT: inserted(document, reference(root)),
    }


def main() -> None:
    """Write the generated files."""
    for file, text in generated().items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
