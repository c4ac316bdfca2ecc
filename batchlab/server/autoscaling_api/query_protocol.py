"""Server side of AWS's query protocol: a form as the request, and XML as the answer.

Invariant: the module works by botocore's service model, and does not contain code for individual actions. For every
operation, `parse` reads the output of botocore's serializer, and botocore's parser reads the output of `result`.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any
from urllib.parse import parse_qsl
from xml.sax.saxutils import escape

from botocore.loaders import Loader
from botocore.model import ListShape, MapShape, OperationModel, ServiceModel, Shape, StructureShape

from batchlab.server.autoscaling_api.app import Fault, Faults, FaultStatus, Request, Response, input_errors
from batchlab.server.autoscaling_api.parameters import check

MAX_FIELDS = 10_000
MAX_DEPTH = 32
_TRUTH = {"true": True, "false": False}
_WHOLE = re.compile(r"[+-]?[0-9]{1,19}")
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(slots=True)
class _Node:
    """Node in the tree of a form's field names. A node has the text of its field, and the nodes of the fields below."""

    text: str | None = None
    parts: dict[str, _Node] = field(default_factory=dict)


def parse(service: ServiceModel, form: str) -> tuple[OperationModel, dict[str, Any]]:
    """Return the requested operation and its parameters. Raise Fault for an unknown operation or a malformed form.

    As on AWS, the function ignores parameters that are not in the service model.
    """
    try:
        fields = dict(parse_qsl(form, keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict"))
    except ValueError as error:
        raise Fault("MalformedQueryString", "The query string cannot be read.") from error
    action, version = fields.pop("Action", ""), fields.pop("Version", "")
    if not action:
        raise Fault("MissingAction", "The request has no action.")
    if action not in service.operation_names or version != service.api_version:
        raise Fault("InvalidAction", f"Could not find operation {action} for version {version or 'NO_VERSION'}")
    operation = service.operation_model(action)
    if not isinstance(operation.input_shape, StructureShape):
        return operation, {}
    return operation, _structure(operation.input_shape, _tree(fields), "") or {}


def _tree(fields: Mapping[str, str]) -> _Node:
    root = _Node()
    for name, text in fields.items():
        steps = name.split(".")
        if len(steps) > MAX_DEPTH:
            raise Fault("MalformedInput", f"The field {name[:100]!r} is nested too deeply.")
        node = root
        for step in steps:
            node = node.parts.setdefault(step, _Node())
        node.text = text
    return root


def _value(shape: Shape, node: _Node, path: str) -> Any:
    """Return the value at `path`, or None if the request does not contain the value."""
    if isinstance(shape, StructureShape):
        return _structure(shape, node, path)
    if isinstance(shape, ListShape):
        return _list(shape, node, path)
    if isinstance(shape, MapShape):
        return _map(shape, node, path)
    if node.text is None:
        return None
    with input_errors(path):
        return _scalar(shape, node.text)


def _structure(shape: StructureShape, node: _Node, path: str) -> dict[str, Any] | None:
    found = {}
    for name, member in shape.members.items():
        wire = member.serialization.get("name", name)
        if isinstance(member, ListShape) and member.serialization.get("flattened"):
            # A request may contain the entries of a flattened list under the entries' name or under the list's name.
            entries = member.member.serialization.get("name", wire)
            wire = entries if entries in node.parts else wire
        if wire in node.parts:
            value = _value(member, node.parts[wire], f"{path}.{name}" if path else name)
            if value is not None:
                found[name] = value
    return found or None


def _list(shape: ListShape, node: _Node, path: str) -> list[Any] | None:
    entries = node
    if not shape.serialization.get("flattened"):
        entries = node.parts.get(shape.member.serialization.get("name", "member"), _Node())
    found = [_value(shape.member, entry, path) for entry in _numbered_nodes(entries, path)]
    if isinstance(shape.member, StructureShape):
        found = [value or {} for value in found]
    sent = [value for value in found if value is not None]
    return sent if sent or node.text is not None else None


def _map(shape: MapShape, node: _Node, path: str) -> dict[str, Any] | None:
    entries = node if shape.serialization.get("flattened") else node.parts.get("entry", _Node())
    key_name = shape.key.serialization.get("name", "key")
    value_name = shape.value.serialization.get("name", "value")
    found = {
        _value(shape.key, entry.parts.get(key_name, _Node()), path): _value(
            shape.value, entry.parts.get(value_name, _Node()), path
        )
        for entry in _numbered_nodes(entries, path)
    }
    if None in found or None in found.values():
        raise Fault("MalformedInput", f"An entry at {path!r} has no key or no value.")
    return found or None


def _numbered_nodes(entries: _Node, path: str) -> list[_Node]:
    with input_errors(path):
        numbered = [(_whole(number), entry) for number, entry in entries.parts.items()]
    return [entry for _, entry in sorted(numbered, key=lambda pair: pair[0])]


def _whole(text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise ValueError(text)
    return int(text)


def _scalar(shape: Shape, text: str) -> Any:
    match shape.type_name:
        case "integer" | "long":
            return _whole(text)
        case "float" | "double":
            number = float(text)
            if not math.isfinite(number):
                raise ValueError(text)
            return number
        case "boolean":
            if text.lower() not in _TRUTH:
                raise ValueError(text)
            return _TRUTH[text.lower()]
        case "timestamp":
            at = datetime.fromisoformat(text)
            return at if at.tzinfo else at.replace(tzinfo=UTC)
        case "blob":
            return base64.b64decode(text, validate=True)
    return text


def result(operation: OperationModel, answer: Mapping[str, Any], request_id: str) -> bytes:
    """Return the body of the answer to a successful request.

    Raise ValueError if the answer does not match the operation's output shape. A mismatch is a bug of the operation.
    """
    name, shape = operation.name, operation.output_shape
    inner = ""
    if shape is not None:
        inner = _format_scalar(shape, answer)
        if wrapper := shape.serialization.get("resultWrapper"):
            inner = f"<{wrapper}>{inner}</{wrapper}>"
    elif answer:
        raise ValueError(f"{name} has an empty answer in the model, but got the members {sorted(answer)}")
    metadata = f"<ResponseMetadata><RequestId>{request_id}</RequestId></ResponseMetadata>"
    return _document(f"{name}Response", operation.service_model, inner + metadata)


def refusal(service: ServiceModel, fault: Fault, status: FaultStatus, request_id: str) -> bytes:
    """Return the body of an error answer."""
    kind = "Sender" if status.is_senders else "Receiver"
    error = f"<Type>{kind}</Type><Code>{_text(fault.code)}</Code><Message>{_text(fault.message)}</Message>"
    return _document("ErrorResponse", service, f"<Error>{error}</Error><RequestId>{request_id}</RequestId>")


def _document(root: str, service: ServiceModel, inner: str) -> bytes:
    namespace = service.metadata.get("xmlNamespace", "")
    return f'<{root} xmlns="{namespace}">{inner}</{root}>'.encode()


def _element(name: str, shape: Shape, value: Any) -> str:
    """Return `value` as an XML element with the name `name`. A flattened list or map becomes several XML elements."""
    flattened = bool(shape.serialization.get("flattened"))
    if isinstance(shape, ListShape):
        own = shape.member.serialization.get("name")
        if flattened:
            return "".join(_element(own or name, shape.member, item) for item in value)
        inner = "".join(_element(own or "member", shape.member, item) for item in value)
    elif isinstance(shape, MapShape):
        entry = name if flattened else "entry"
        inner = "".join(f"<{entry}>{pair}</{entry}>" for pair in _entries(shape, value))
        if flattened:
            return inner
    else:
        inner = _format_scalar(shape, value)
    return f"<{name}>{inner}</{name}>"


def _entries(shape: MapShape, value: Mapping[str, Any]) -> Iterable[str]:
    key_name = shape.key.serialization.get("name", "key")
    value_name = shape.value.serialization.get("name", "value")
    for key, item in value.items():
        yield _element(key_name, shape.key, key) + _element(value_name, shape.value, item)


def _format_scalar(shape: Shape, value: Any) -> str:
    if isinstance(shape, StructureShape):
        return _members(shape, value)
    match shape.type_name:
        case "boolean":
            return "true" if value else "false"
        case "timestamp":
            at = value.astimezone(UTC).isoformat(timespec="milliseconds")
            return str(at).removesuffix("+00:00") + "Z"
        case "blob":
            return base64.b64encode(value).decode()
        case "string":
            if not isinstance(value, str):
                raise ValueError(f"{shape.name} must be a string, but is {value!r}")
    return _text(str(value))


def _members(shape: StructureShape, answer: Mapping[str, Any]) -> str:
    members = {name: value for name, value in answer.items() if value is not None}
    unknown = members.keys() - shape.members.keys()
    missing = set(shape.required_members) - members.keys()
    if unknown or missing:
        raise ValueError(f"{shape.name}: unknown {sorted(unknown)}, missing {sorted(missing)}")
    return "".join(
        _element(member.serialization.get("name", name), member, members[name])
        for name, member in shape.members.items()
        if name in members
    )


def _text(text: str) -> str:
    # XML parsers read an unescaped carriage return as a newline.
    return escape(_NOT_XML.sub("\ufffd", text), {"\r": "&#13;"})


Act = Callable[[OperationModel, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""Function that performs an operation with checked parameters. An Act raises Fault if the operation fails."""


@cache
def model(name: str) -> ServiceModel:
    """Return botocore's newest model of the service."""
    return ServiceModel(Loader().load_service_model(name, "service-2"), name)


class QueryService:
    """AWS service with the query protocol: the service parses and checks a request, and calls `act`."""

    def __init__(self, service: ServiceModel, act: Act) -> None:
        self._service = service
        self._faults = Faults(service)
        self._act = act

    async def answer(self, request: Request, request_id: str) -> Response:
        try:
            form = request.body.decode("ascii")
        except UnicodeDecodeError as error:
            raise Fault("MalformedQueryString", "The request is not a form.") from error
        operation, parameters = parse(self._service, form)
        check(operation, parameters)
        answer = await self._act(operation, parameters)
        return Response(200, result(operation, answer, request_id))

    def refuse(self, _: Request, fault: Fault, request_id: str) -> Response:
        status = self._faults.status(fault)
        return Response(status.status, refusal(self._service, fault, status, request_id))
