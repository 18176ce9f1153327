"""Values of the chart with a word of its own for every string, and renders as Kubernetes reads them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from support.chart import CHART, helm

WORDS = (
    "on",
    "null",
    "y",
    "~",
    "1e3",
    "123456",
    "0x1f",
    "2026-01-01",
    "*.example.com",
    "a: b #c",
    'it\'s "q"',
)
NAMES = ("on", "null", "y")
"""Words that are names of Kubernetes objects and values of labels."""
LABELS = (*NAMES, "1e3", "123456")

SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
AFFIXES = (("", ""), ("/", ""), ("", "/0"))
"""What is put around a word where the schema asks for a path or a network."""
PATHS = ("serve.checkpoint",)
"""Values of which the chart takes only absolute paths, without a pattern of the schema."""

OTHER_FORMS = {
    "image.digest": "a digest",
    "rayVersion": "a version",
    "expertResource.name": "a name of Ray's",
    "monitoring.podMonitor.interval": "a duration",
    "monitoring.podMonitor.scrapeTimeout": "a duration",
    "tls.certManager.duration": "a duration",
    "tls.certManager.renewBefore": "a duration",
    "serve.config": "raymoe's configuration, in a test of its own",
    "train.config": "raymoe's configuration, in a test of its own",
    "checkpoints.volume": "any volume, in a test of its own",
    "workerGroups": "has the fields of workerDefaults",
    "extraObjects": "objects of the user",
    "global": "helm's own",
}
"""Values that cannot be such words, and why."""


class KubernetesLoader(yaml.CSafeLoader):
    """YAML as Kubernetes and helm read it, which know more numbers and truth values than PyYAML."""


KubernetesLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)
KubernetesLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^[yYnN]$"), list("yYnN"))


Word = Callable[[str, tuple[str, ...]], str]
"""The string of a value: takes its path and the words that it may be."""


def filled(schema: dict[str, Any], path: str, word: Word) -> Any:
    """Values with a string wherever there may be one; None where there may not."""
    schema = resolved(schema)
    kinds = schema.get("type", "")
    if path in OTHER_FORMS or path.endswith(".resources") or "enum" in schema or "anyOf" in schema:
        return None  # resources are quantities, and names of claims that the pod has
    if "string" in kinds:
        return affixed(schema.get("pattern", ""), path, word)
    if kinds == "array":
        item = filled(schema.get("items", {}), path, word)
        return None if item is None else [item]
    if kinds != "object":
        return None
    fields: dict[str, Any] = {}
    for name, field in schema.get("properties", {}).items():
        fields[name] = filled(field, f"{path}.{name}".lstrip("."), word)
    for name in schema.get("required", ()):
        if not fields.get(name):
            fields[name] = word(f"{path}.{name}", WORDS)
    more = schema.get("additionalProperties", True)
    if more is True and not fields:
        fields["free"] = word(path, WORDS)
    if isinstance(more, dict):
        fields["key"] = filled(more, path, word)
    return {name: field for name, field in fields.items() if field is not None} or None


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with what it refers to; without Kubernetes' own fields, which have a test of their own."""
    for part in (schema, *schema.get("allOf", ())):
        if part.get("$ref", "").startswith("#/definitions/kube."):
            return {}
        if "$ref" in part:
            target = SCHEMA
            for name in part["$ref"].removeprefix("#/").split("/"):
                target = target[name]
            return resolved(target)
    return schema


def affixed(pattern: str, path: str, word: Word) -> str:
    """A string that the pattern takes."""
    affixes = AFFIXES[1:] if path in PATHS else AFFIXES
    before, after = next((b, a) for b, a in affixes if re.search(pattern, f"{b}tok0x{a}"))
    fits = tuple(one for one in WORDS if re.search(pattern, f"{before}{one}{after}"))
    assert fits, f"{path}: no word fits {pattern}; list it in OTHER_FORMS"
    return f"{before}{word(path, fits)}{after}"


def restricted(path: str, words: tuple[str, ...]) -> tuple[str, ...]:
    """The words that the chart takes for a value, where it takes fewer than the schema."""
    if path in ("nameOverride", "fullnameOverride", "namespaceOverride"):
        return NAMES
    return LABELS if path.rpartition(".")[2].lower().endswith("labels") else words


def rendered(version: str, values: dict[str, Any], file: Path, *more: str) -> list[Any]:
    """The objects of these values as Kubernetes reads them; texts within them are read as well."""
    file.write_text(json.dumps(values), encoding="utf-8")
    text = helm(version, "template", *(more or ("demo",)), CHART, "--values", file).stdout
    objects = [one for one in yaml.load_all(text, Loader=KubernetesLoader) if one]
    for one in objects:
        if one["kind"] == "Secret":
            one["data"] = dict.fromkeys(one["data"], "random")
        if one["kind"] == "RayService":
            one["spec"]["serveConfigV2"] = yaml.load(one["spec"]["serveConfigV2"], Loader=KubernetesLoader)
        if one["kind"] == "ConfigMap" and "train.sh" in one["data"]:
            one["data"]["train.sh"] = [read_setting(part) for part in shlex.split(one["data"]["train.sh"])]
    return objects


def read_setting(part: str) -> Any:
    """A word of the job's script, and the JSON in it."""
    name, equals, value = part.partition("=")
    return [name, json.loads(value)] if equals and value[:1] in '"[{' else part


def replaced(value: Any, words: dict[str, str]) -> Any:
    """A render with each name replaced by its word."""
    if isinstance(value, str):
        return re.sub(r"tok\d+x", lambda found: words[found[0]], value)
    if isinstance(value, list):
        return [replaced(one, words) for one in value]
    if isinstance(value, dict):
        return {replaced(name, words): replaced(one, words) for name, one in value.items()}
    return value


def in_order(objects: list[Any]) -> list[Any]:
    """Objects by kind and name, and their worker groups by name: helm orders what names of users begin."""
    return sorted(
        map(_with_groups_in_order, objects), key=lambda one: (one["kind"], str(one["metadata"]["name"]))
    )


def _with_groups_in_order(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    ordered = {name: _with_groups_in_order(value) for name, value in part.items()}
    if "workerGroupSpecs" in ordered:
        ordered["workerGroupSpecs"] = sorted(
            part["workerGroupSpecs"], key=lambda group: str(group["groupName"])
        )
    return ordered


class Names:
    """A name of its own for each value, and the words that it may be."""

    def __init__(self) -> None:
        self.paths: dict[str, str] = {}
        self.words: dict[str, tuple[str, ...]] = {}

    def __call__(self, path: str, words: tuple[str, ...]) -> str:
        name = f"tok{len(self.paths)}x"
        self.paths[name], self.words[name] = path, words
        return name


def differences(before: Any, after: Any, at: str = "") -> Iterator[str]:
    """Where two renders differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {**before, **after}:
            yield from differences(before.get(name), after.get(name), f"{at}.{name}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for place, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from differences(one, other, f"{at}[{place}]")
    elif before != after or type(before) is not type(after):
        yield f"{at}: {before!r} became {after!r}"
