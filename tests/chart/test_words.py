"""Every string of the values is rendered as that very string, whatever YAML reads such a word as.

A render with a name of its own for each string shows where each of them goes. The same render with words that
YAML reads as something else (`on`, `1e3`, `*.example.com`) has to have those very words in the same places.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.chart import CHART, HELMS, helm

pytestmark = pytest.mark.chart

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


def everything(mode: str) -> dict[str, Any]:
    """Values of a mode with every object that it can have."""
    values: dict[str, Any] = {
        "mode": mode,
        "autoscaling": {"enabled": True},
        "monitoring": {"podMonitor": {"enabled": True}},
    }
    if mode == "serve":
        for name in ("prometheusRule", "dashboard"):
            values["monitoring"][name] = {"enabled": True}
        values |= {"ingress": {"enabled": True}, "httpRoute": {"enabled": True}}
        values["serve"] = {"service": {"type": "LoadBalancer"}}
    if mode == "train":
        values["train"] = {"shutdownAfterJobFinishes": False}
    return values


OWN = {"tls": {"certManager": {"enabled": False}}}
MANAGED = {"tls": {"certManager": {"enabled": True}}}
BASES = {
    "serve": (everything("serve") | OWN, ("tls.certManager.issuerRef",)),
    "serve-managed": (everything("serve") | MANAGED, ("tls.existingSecret", "checkpoints.existingClaim")),
    "train": (
        everything("train") | OWN,
        ("tls.certManager.issuerRef", "tls.existingSecret", "auth.existingSecret"),
    ),
    "train-default": (
        everything("train") | OWN,
        ("tls.certManager.issuerRef", "train.entrypoint", "train.output", "checkpoints.existingClaim"),
    ),
    "cluster": (everything("cluster") | OWN, ("tls.certManager.issuerRef", "serviceAccount.name")),
}
"""Values with as many objects as fit together, and the values that do not fit them."""

Word = Callable[[str, tuple[str, ...]], str]
"""The string of a value: takes its path and the words that it may be."""


def filled(schema: dict[str, Any], path: str, word: Word) -> Any:
    """Values with a string wherever there may be one; None where there may not."""
    schema = resolved(schema)
    kinds = schema.get("type", "")
    if path in OTHER_FORMS or "enum" in schema or "anyOf" in schema:
        return None
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
    """The schema with what it refers to."""
    for part in (schema, *schema.get("allOf", ())):
        if "$ref" in part:
            return resolved(SCHEMA["definitions"][part["$ref"].rpartition("/")[2]])
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


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Both, and of what both have, what is in the second."""
    result = copy.deepcopy(base)
    for name, value in more.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if both else value
    return result


def values_of(base: str, word: Word) -> dict[str, Any]:
    """The values of a base, with all strings."""
    fixed, left_out = BASES[base]
    values = filled(SCHEMA, "", lambda path, words: word(path, restricted(path, words)))
    for path in left_out:
        *around, name = path.split(".")
        section = values
        for one in around:
            section = section[one]
        section.pop(name, None)
    return merged(values, fixed)


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
    return sorted(objects, key=lambda one: (one["kind"], str(one["metadata"]["name"])))


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


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("base", BASES)
def test_a_word_stays_a_word(version: str, base: str, tmp_path: Path) -> None:
    names = Names()
    shape = rendered(version, values_of(base, names), tmp_path / "values.yaml")
    for turn in range(len(WORDS)):
        word_of = {name: words[turn % len(words)] for name, words in names.words.items()}
        order = itertools.count()

        def word(path: str, words: tuple[str, ...]) -> str:
            return word_of[f"tok{next(order)}x"]  # noqa: B023

        found = rendered(version, values_of(base, word), tmp_path / "values.yaml")
        expected = in_order(replaced(shape, word_of))
        assert not list(differences(expected, in_order(found)))


def test_every_string_is_rendered_somewhere(tmp_path: Path) -> None:
    seen: set[str] = set()
    names = Names()
    for base in BASES:
        names = Names()
        text = json.dumps(rendered("helm4", values_of(base, names), tmp_path / "values.yaml"))
        seen |= {path for name, path in names.paths.items() if name in text}
    assert set(names.paths.values()) - seen == set()


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("word", NAMES)
def test_names_of_release_namespace_and_groups(version: str, word: str, tmp_path: Path) -> None:
    def values(one: str) -> dict[str, Any]:
        groups = {one: {"role": "expert"}}
        claims = {one: {"devices": {}}}
        return {"mode": "cluster", "workerGroups": groups, "resourceClaimTemplates": claims}

    file = tmp_path / "values.yaml"
    shape = rendered(version, values("tok0x"), file, "tok0x", "--namespace", "tok0x")
    found = rendered(version, values(word), file, word, "--namespace", word)
    assert not list(differences(in_order(replaced(shape, {"tok0x": word})), in_order(found)))


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("word", ["1e3", "123456"])
def test_a_release_whose_name_is_a_number(version: str, word: str, tmp_path: Path) -> None:
    values = {"mode": "train", "fullnameOverride": "demo"}
    file = tmp_path / "values.yaml"
    shape = rendered(version, values, file, "tok0x")
    found = rendered(version, values, file, word)
    assert not list(differences(in_order(replaced(shape, {"tok0x": word})), in_order(found)))


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("word", WORDS)
def test_words_of_raymoes_own_configuration(version: str, word: str, tmp_path: Path) -> None:
    def values(mode: str, one: str) -> dict[str, Any]:
        return {
            "mode": mode,
            "serve": {"checkpoint": f"/{one}", "config": {"serving": {"name": one}}},
            "train": {"output": f"/{one}", "config": {"data": {"path": one}}},
            "checkpoints": {"volume": {"csi": {"driver": one}}},
        }

    file = tmp_path / "values.yaml"
    for mode in ("serve", "train"):
        shape = rendered(version, values(mode, "tok0x"), file)
        found = rendered(version, values(mode, word), file)
        assert not list(differences(in_order(replaced(shape, {"tok0x": word})), in_order(found)))
