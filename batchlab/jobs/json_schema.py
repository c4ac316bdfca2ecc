"""JSON Schemas of job files and scenario files, for editors."""

from __future__ import annotations

import json

from pydantic import BaseModel

from batchlab.core.model import Json
from batchlab.jobs.schema import JobSpec


def json_schema() -> dict[str, Json]:
    """Return the JSON Schema (draft 2020-12) of the job file, for editors."""
    return schema_of(JobSpec, "batchlab job file")


def schema_of(model: type[BaseModel], title: str) -> dict[str, Json]:
    """Return the JSON Schema (draft 2020-12) of a `model`.

    Its definitions use the models' titles.
    """
    schema: dict[str, Json] = _plain(model.model_json_schema())
    text = json.dumps(schema)
    for name, part in schema["$defs"].items():
        title_of = part.get("title", name)
        if name != title_of:
            text = text.replace(json.dumps(name), json.dumps(title_of))
            text = text.replace(f"#/$defs/{name}", f"#/$defs/{title_of}")
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, **json.loads(text), "title": title}


def _plain(schema: Json) -> Json:
    """Return `schema` without two additions of pydantic.

    These are titles that repeat the key, and null as the default of an optional key. A job file
    cannot contain null.
    """
    if isinstance(schema, list):
        return [_plain(one) for one in schema if one != {"type": "null"}]
    if not isinstance(schema, dict):
        return schema
    plain = {key: _plain(value) for key, value in schema.items()}
    for key, field in plain.get("properties", {}).items():
        if field.get("title") == key.replace("_", " ").title():
            del field["title"]
        if "default" in field and field["default"] is None:
            del field["default"]
        if len(field.get("anyOf", ())) == 1:
            field.update(field.pop("anyOf")[0])
    return plain
