"""The reference of the HTTP API, from its OpenAPI document.

Invariant: every operation and every schema of the document is in it.
"""

from __future__ import annotations

from typing import Any

from docs.reference.markdown import head, table, text

_WORDS = """\

# HTTP API

The manager serves JSON under `/v1`. The command line, the web page, and the Python API are clients
of the HTTP API. Every manager serves the machine-readable description of the HTTP API at
`/openapi.json`. This page is generated from that description.

- A manager listens on 127.0.0.1, or in the grid's own network of containers. In the grid's folder,
  the file `manager.json` contains the manager's address, and the file `token` contains the token.
- Every request needs the header `Authorization: Bearer TOKEN`, also a request for `/metrics`. Only
  the [public routes](../security.md#access) do not need this header. The command line and the Python
  API sign their requests instead, and never send the token to a port
  ([network](../security.md#network)).
- Fields whose name ends with `_s` are in seconds. Points in time are in seconds since 1970 (UTC).
- The body of an error response is a [ProblemView](#problemview). The status is 400 or 422 if the
  request is wrong, 401 if the token is missing or wrong, 404 if the requested object does not
  exist, and 409 if the state of the object does not allow the request. The status is 503 if the
  manager is not the leader or the backend does not answer; the client can repeat the request later.
- The parameter `wait_s` requests a long poll: the manager answers as soon as the answer contains
  something new, or after `wait_s` seconds.

"""


def reference() -> str:
    """The page in Markdown."""
    from batchlab.server.http import description

    document = description()
    operations = [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    rows = [(f"[`{method} {path}`](#{_anchor(one)})", text(_paragraphs(one)[0])) for method, path, one in operations]
    pages = [head("the API's OpenAPI document"), _WORDS, table(("request", "effect"), rows)]
    pages.append("\n## Requests\n")
    pages += [_operation(method, path, one) for method, path, one in operations]
    pages.append("\n## Schemas\n")
    schemas = document["components"]["schemas"]
    pages += [_schema(name, schemas[name]) for name in sorted(schemas)]
    return "".join(pages)


def _anchor(operation: dict[str, Any]) -> str:
    return str(operation["summary"]).lower().replace(" ", "-")


def _paragraphs(one: dict[str, Any]) -> list[str]:
    words = one.get("description") or one.get("summary") or ""
    return [" ".join(part.split()) for part in words.split("\n\n")]


def _operation(method: str, path: str, one: dict[str, Any]) -> str:
    lines = [f"\n### {one['summary']}\n", f"```text\n{method} {path}\n```\n"]
    lines += [text(words) + "\n" for words in _paragraphs(one)]
    if parameters := one.get("parameters"):
        rows = [(f"`{p['name']}`", p["in"], _form(p["schema"]), text(p.get("description", ""))) for p in parameters]
        lines.append(table(("parameter", "in", "form", "meaning"), rows))
    if body := one.get("requestBody"):
        lines.append(f"Request body: {_content(body['content'])}.\n")
    for status, answer in sorted(one["responses"].items()):
        if status < "300":
            said = _content(answer.get("content", {}))
            lines.append(f"{status}: {said or 'an empty answer'}.\n")
    return "\n".join(lines)


def _content(content: dict[str, Any]) -> str:
    forms = []
    for kind, one in content.items():
        form = _form(one["schema"]) if one.get("schema") else ""
        forms.append(" ".join(filter(None, (f"`{kind}`", form))))
    return ", or ".join(forms)


def _schema(name: str, schema: dict[str, Any]) -> str:
    lines = [f"\n### {name}\n"]
    if schema.get("description"):
        lines += [text(words) + "\n" for words in _paragraphs(schema)]
    if "properties" in schema:
        rows = [
            (
                f"`{key}`",
                _form(field),
                "required" if key in schema.get("required", ()) else _default(field),
                text(field.get("description", "")),
            )
            for key, field in schema["properties"].items()
        ]
        lines.append(table(("key", "form", "default", "meaning"), rows))
    else:
        lines.append(f"{_form(schema)}\n")
    return "\n".join(lines)


def _default(field: dict[str, Any]) -> str:
    default = field.get("default")
    return "" if default in (None, "", [], {}) else f"`{default}`"


def _form(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if parts := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        return " or ".join(dict.fromkeys(_form(one) for one in parts))
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        inner = schema.get("items") or {}
        if not inner and "prefixItems" in schema:
            inner = schema["prefixItems"][0]
        return f"list of {_form(inner)}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"mapping to {_form(schema['additionalProperties'])}"
    return _KINDS.get(schema.get("type", ""), "any value")


_KINDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
    "object": "mapping",
    "null": "`null`",
}
