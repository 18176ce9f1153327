"""values.schema.json, from values.yaml and raymoe's own configuration; closed, so that a typo is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helm.kuberay import definitions as kuberay_definitions
from helm.values import Value
from jobs.config.run_config import RunConfig
from jobs.serving.config import ServeConfig

Schema = dict[str, Any]

_QUANTITY: Schema = {
    "anyOf": [
        {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"},
        {"type": "number", "minimum": 0},
    ]
}
_AMOUNTS: Schema = {"type": "object", "additionalProperties": {"$ref": "#/definitions/Quantity"}}
_CLAIM: Schema = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "request": {"type": "string"}},
}
_RESOURCES: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "requests": _AMOUNTS,
        "limits": _AMOUNTS,
        "claims": {"type": "array", "items": _CLAIM},
    },
}
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def values_schema(root: Value) -> Schema:
    """The JSON schema of all values, in draft 7, which helm 3 and helm 4 read.

    Raises:
        ValueError: a mapping or null of values.yaml does not say what may be in it.
    """
    sections = {child.name: child for child in root.children}
    definitions: Schema = {
        "Quantity": _QUANTITY,
        "Resources": _RESOURCES,
        "VolumeSource": _volume_source(),
    }
    for model in (ServeConfig, RunConfig):
        definitions |= _definitions(model.__name__, model.model_json_schema())
    for child in root.children:
        if child.entries:
            definitions[child.entries] = _schema(sections[child.entries], sections)
    for section in root.sections():
        if section.fields:
            definitions[section.fields] = _schema(sections[section.fields], sections)
    body = _schema(root, sections)
    definitions |= kuberay_definitions([body, definitions])
    body["properties"]["global"] = {"type": "object"}  # helm's own, when the chart is part of another one
    return {"$schema": "http://json-schema.org/draft-07/schema#", **body, "definitions": definitions}


def _schema(value: Value, sections: Mapping[str, Value]) -> Schema:
    if value.children:
        properties = {child.path[-1]: _schema(child, sections) for child in value.children}
        if value.fields:
            shared = f"#/definitions/{value.fields}/properties"
            names = [child.path[-1] for child in sections[value.fields].children]
            properties = {name: {"$ref": f"{shared}/{name}"} for name in names} | properties
        return _described(value, {"type": "object", "additionalProperties": False, "properties": properties})
    if value.entries:
        entry = {"$ref": f"#/definitions/{value.entries}"}
        return _described(value, {"type": "object", "additionalProperties": entry})
    said = dict(value.schema)
    if "$ref" in said:
        return _described(value, {"allOf": [said]})  # beside a $ref, draft 7 reads nothing
    if said.pop("free", False):
        return _described(value, {"type": "object"})
    kind = _TYPES.get(type(value.default))
    if "type" not in said and kind is None:
        raise ValueError(f"values.yaml: {value.name} is null; say in `# @schema` which type it has")
    schema = {"type": kind, **said}
    if kind == "object" and "additionalProperties" not in schema:
        raise ValueError(f"values.yaml: {value.name} is a mapping; say in `# @schema` what may be in it")
    return _described(value, schema)


def _volume_source() -> Schema:
    """Of a Kubernetes volume, one source, as KubeRay takes them."""
    volume = kuberay_definitions({"$ref": "#/definitions/kube.pod.volumes"})["kube.pod.volumes"]["items"]
    sources = {name: schema for name, schema in volume["properties"].items() if name != "name"}
    return {"type": "object", "additionalProperties": False, "maxProperties": 1, "properties": sources}


def _described(value: Value, schema: Schema) -> Schema:
    return {"description": value.text, **schema} if value.text else schema


def _definitions(name: str, schema: Mapping[str, Any]) -> Schema:
    """The schemas of a pydantic model and its parts, without required fields, since raymoe has defaults."""
    parts = {name: schema, **schema["$defs"]}
    return {part: _as_values(text) for part, text in parts.items()}


def _as_values(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_as_values(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept: Schema = {}
    for key, part in schema.items():
        if key == "$ref":
            kept[key] = part.replace("#/$defs/", "#/definitions/")
        elif key == "properties":
            kept[key] = {name: _as_values(field) for name, field in part.items()}
        elif key not in ("$defs", "required", "title", "default", "description"):
            kept[key] = _as_values(part)
    return kept


__all__ = ["values_schema"]
