"""The JSON Schema of `router.yaml`, for editors."""

from typing import Any

from router.settings import Config

_NULL = {"type": "null"}
_VARIABLE = {"$ref": "#/$defs/Variable"}


def schema() -> dict[str, Any]:
    """JSON Schema of the file, for editors: with short forms, and `${NAME}` where a value fits."""
    made: dict[str, Any] = _tidied(Config.model_json_schema())
    made["$defs"]["Variable"] = {
        "description": "filled in from the environment",
        "type": "string",
        "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*\}",
    }
    either = [{"required": ["nodes"]}, {"required": ["pools"]}]
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, "title": "router.yaml", **made, "oneOf": either}


def _tidied(node: Any) -> Any:
    """Drop what says nothing, and let a variable stand wherever not every text may."""
    if isinstance(node, list):
        return [_tidied(item) for item in node]
    if not isinstance(node, dict):
        return node
    if _NULL in node.get("anyOf", ()):  # None is only the default: the file has no nulls
        present = next(item for item in node["anyOf"] if item != _NULL)
        return _tidied({**{k: v for k, v in node.items() if k != "anyOf"}, **present})
    tidy = {
        key: value if key in ("default", "propertyNames", "anyOf") else _tidied(value)
        for key, value in node.items()
        if not (key == "title" and isinstance(value, str))
        and not (key == "default" and value in (None, [], {}))
    }
    return _admitting(tidy)


def _admitting(node: dict[str, Any]) -> dict[str, Any]:
    if "anyOf" in node:
        narrow = any(map(_narrow, node["anyOf"]))
        forms = [item if _narrow(item) else _tidied(item) for item in node["anyOf"]]
        return {**node, "anyOf": [*forms, _VARIABLE] if narrow else forms}
    if not _narrow(node):
        return node
    notes: dict[str, Any] = {
        key: node.pop(key) for key in ("description", "default") if key in node
    }
    notes["anyOf"] = [node, _VARIABLE]
    return notes


def _narrow(node: dict[str, Any]) -> bool:
    """Whether a schema refuses some texts, of which a variable would be one."""
    scalar = node.get("type") in ("integer", "number", "boolean")
    return scalar or any(
        isinstance(node.get(key), str | list) for key in ("pattern", "enum", "const")
    )
