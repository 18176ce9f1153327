"""Schemas of KubeRay's fields, for the chart's: `python -m helm.kuberay CRDS` writes helm/kuberay.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]

FILE = Path(__file__).parent / "kuberay.json"
"""The schemas as the chart's own ones refer to them; KubeRay v1.7.0's, closed."""

PREFIX = "kube."
"""Beginning of the names of these definitions in values.schema.json."""

_DROPPED = ("format", "description")


def extracted(crds: Path) -> dict[str, Schema]:
    """Schemas by name, from a folder with KubeRay's custom resource definitions.

    Fields of pods, containers and RayJobs have a definition each (`pod.affinity`, `container.env`). A
    RayCluster's spec, its groups and its autoscaler have one each (`cluster`, `head`, `group`, `autoscaler`).
    """
    cluster = _spec(crds, "rayclusters")
    head, group = cluster["headGroupSpec"]["properties"], cluster["workerGroupSpecs"]["items"]["properties"]
    pod = dict(group["template"]["properties"]["spec"]["properties"])
    container = pod["containers"]["items"]
    for name in ("containers", "initContainers", "ephemeralContainers"):
        del pod[name]
    fields = container["properties"]
    found = {f"pod.{name}": field for name, field in pod.items()}
    found |= {f"container.{name}": field for name, field in fields.items()}
    found["podSpec"] = _closed(dict.fromkeys(pod), "pod.")
    found["containerSpec"] = _closed(dict.fromkeys(fields), "container.")
    found["containers"] = {
        "type": "array",
        "items": {**_closed(dict.fromkeys(fields), "container."), "required": ["name"]},
    }
    found["cluster"] = _object(cluster, ("headGroupSpec", "workerGroupSpecs", "autoscalerOptions"))
    found["autoscaler"] = _object(cluster["autoscalerOptions"]["properties"], ())
    found["head"] = _object(head, ("template",))
    found["group"] = _object(group, ("template",))
    job = _object(_spec(crds, "rayjobs"), ("rayClusterSpec", "submitterPodTemplate"))
    found |= {f"job.{name}": field for name, field in job["properties"].items()}
    return {name: found[name] for name in sorted(found)}


def definitions(schema: Any, known: Mapping[str, Schema] | None = None) -> dict[str, Schema]:
    """The definitions of this file that a schema refers to, directly or through one another.

    Raises:
        KeyError: a reference names no definition.
    """
    known = json.loads(FILE.read_text(encoding="utf-8")) if known is None else known
    found: dict[str, Schema] = {}
    for name in _references(schema):
        if name not in found:
            found[name] = known[name.removeprefix(PREFIX)]
            found |= definitions(found[name], known)
    return found


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, list):
        for part in schema:
            yield from _references(part)
    if isinstance(schema, Mapping):
        target = schema.get("$ref")
        if isinstance(target, str) and target.startswith(f"#/definitions/{PREFIX}"):
            yield target.removeprefix("#/definitions/")
        for part in schema.values():
            yield from _references(part)


def _spec(crds: Path, name: str) -> dict[str, Schema]:
    definition = yaml.load((crds / f"ray.io_{name}.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
    (version,) = (one for one in definition["spec"]["versions"] if one["name"] == "v1")
    return dict(_draft7(version["schema"]["openAPIV3Schema"])["properties"]["spec"]["properties"])


def _closed(fields: Mapping[str, Any], prefix: str) -> Schema:
    """An object of these fields, each by its definition."""
    properties = {name: {"$ref": f"#/definitions/{PREFIX}{prefix}{name}"} for name in fields}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _object(fields: Mapping[str, Schema], left_out: tuple[str, ...]) -> Schema:
    kept = {name: field for name, field in fields.items() if name not in left_out}
    return {"type": "object", "additionalProperties": False, "properties": kept}


def _draft7(schema: Any) -> Any:
    """An OpenAPI schema in JSON schema's draft 7, closed: an object has only the fields that it names."""
    if isinstance(schema, list):
        return [_draft7(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made: Schema = {}
    for key, part in schema.items():
        if key == "properties":
            made[key] = {name: _draft7(field) for name, field in part.items()}
        elif key in ("enum", "required", "pattern"):
            made[key] = part
        elif key not in _DROPPED and key != "default" and not key.startswith("x-"):
            made[key] = _draft7(part)
    open_to_all = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in made and "additionalProperties" not in made and not open_to_all:
        made["additionalProperties"] = False
    if "required" in made and any("default" in schema["properties"].get(one, {}) for one in made["required"]):
        made["required"] = [one for one in made["required"] if "default" not in schema["properties"][one]]
    return made


def main() -> None:
    """Write the file."""
    found = extracted(Path(sys.argv[1]))
    lines = [f"{json.dumps(name)}: {json.dumps(schema, sort_keys=True)}" for name, schema in found.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()


__all__ = ["FILE", "PREFIX", "definitions", "extracted"]
