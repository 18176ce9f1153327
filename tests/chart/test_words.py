"""Every string of the values is rendered as that very string, whatever YAML reads such a word as.

A render with a name of its own for each string shows where each of them goes. The same render with words that
YAML reads as something else (`on`, `1e3`, `*.example.com`) has to have those very words in the same places.
"""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from support.chart import HELMS
from support.chart_words import (
    NAMES,
    SCHEMA,
    WORDS,
    Names,
    Word,
    differences,
    filled,
    in_order,
    rendered,
    replaced,
    restricted,
)

pytestmark = pytest.mark.chart


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
        values |= {name: {"enabled": True} for name in ("ingress", "httpRoute", "grpcRoute")}
        values["serve"] = {"service": {"type": "LoadBalancer"}, "grpcPort": 9000}
    if mode == "train":
        values["train"] = {"shutdownAfterJobFinishes": False}
    return values


OWN = {"tls": {"certManager": {"enabled": False}}}
MANAGED = {"tls": {"certManager": {"enabled": True}}}
BASES = {
    "serve": (everything("serve") | OWN, ("tls.certManager.issuerRef",)),
    "serve-managed": (
        everything("serve") | MANAGED,
        ("tls.existingSecret", "checkpoints.existingClaim", "head", "workerDefaults", "tests"),
    ),
    "serve-fetched": (
        everything("serve")
        | OWN
        | {"checkpoints": {"enabled": False}, "serve": {"checkpoint": "hf://a/b", "grpcPort": 9000}},
        ("tls.certManager.issuerRef", "checkpoints.existingClaim", "serve.service"),
    ),
    "train": (
        everything("train") | OWN,
        ("tls.certManager.issuerRef", "tls.existingSecret", "auth.existingSecret"),
    ),
    "train-default": (
        everything("train") | OWN,
        (
            *("tls.certManager.issuerRef", "train.entrypoint", "train.output", "checkpoints.existingClaim"),
            *("tests.labels", "tests.annotations"),
        ),
    ),
    "cluster": (
        everything("cluster") | OWN,
        (
            "tls.certManager.issuerRef",
            "serviceAccount.name",
            "head",
            "workerDefaults",
            "tests",
            "podDefaults",
        ),
    ),
}
"""Values with as many objects as fit together, and the values that do not fit them."""


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
def test_words_in_fields_of_kubernetes(version: str, word: str, tmp_path: Path) -> None:
    def values(one: str) -> dict[str, Any]:
        container = {"name": one, "image": one, "args": [one], "env": [{"name": one, "value": one}]}
        pods = {
            "tolerations": [{"key": one, "value": one}],
            "extraEnv": [{"name": one, "valueFrom": {"secretKeyRef": {"name": one, "key": one}}}],
            "extraVolumes": [{"name": one, "nfs": {"server": one, "path": one}}],
            "extraVolumeMounts": [{"name": one, "mountPath": one}],
            "initContainers": [container],
            "dnsConfig": {"searches": [one]},
            "podSpec": {"nodeName": one},
        }
        return {"mode": "train", "podDefaults": pods}

    file = tmp_path / "values.yaml"
    shape, found = rendered(version, values("tok0x"), file), rendered(version, values(word), file)
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
