"""The process of the SimpleDB server. The server implements SimpleDB's query protocol of 2009-04-15 over HTTP.

Run it as `python -m tests.support.simpledb.server PORT`. The server keeps all data in memory. The additional path
`/_fake` controls the server: a POST of `Weather`'s fields sets the faults, and a GET returns the number of calls of
each action.
"""

from __future__ import annotations

import base64
import json
import re
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from urllib.parse import parse_qsl, urlsplit
from xml.sax.saxutils import escape

from tests.support.simpledb.domain import MAX_BATCH, Domain, Expected, Fault, Put
from tests.support.simpledb.expressions import Item, SelectError, parse

VERSION = "2009-04-15"
MAX_REQUEST = 1024 * 1024
MAX_DOMAINS = 250
_DOMAIN = re.compile(r"[A-Za-z0-9_.-]{3,255}")
_WITH_RESULT = ("GetAttributes", "Select", "ListDomains", "DomainMetadata")
_XML = "http://sdb.amazonaws.com/doc/2009-04-15/"
_RESTRICTED = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass
class Weather:
    """The faults of the server, which a test sets."""

    throttle: float = 0.0
    """The share of calls that the server answers with 503 and does not perform."""
    lose: float = 0.0
    """The share of calls that the server performs but answers by closing the connection."""
    lag_s: float = 0.0
    """The maximum delay of an eventually consistent read."""
    short: float = 0.0
    """The share of pages of Select that the server cuts short, as SimpleDB does after five seconds."""
    max_attributes: int = 1_000_000_000
    max_bytes: int = 10 * 1024**3
    stop_after: int = -1
    """The number of calls after which the server rejects all calls, which simulates the death of a client. The value -1
    disables the limit."""


Parameters = Mapping[str, str]


class Service:
    """All domains and the server's faults. The service handles one call at a time."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = Random(seed)
        self.weather = Weather()
        self.asked: Counter[str] = Counter()
        self._domains: dict[str, Domain] = {}
        self._lock = threading.Lock()
        self._actions: dict[str, Callable[[Parameters], str]] = {
            "CreateDomain": self._create_domain,
            "DeleteDomain": self._delete_domain,
            "ListDomains": self._list_domains,
            "DomainMetadata": self._domain_metadata,
            "PutAttributes": self._put,
            "BatchPutAttributes": self._batch_put,
            "GetAttributes": self._get,
            "DeleteAttributes": self._delete,
            "BatchDeleteAttributes": self._batch_delete,
            "Select": self._select,
        }

    def set_weather(self, **changes: float) -> None:
        with self._lock:
            for name, value in changes.items():
                setattr(self.weather, name, value)

    def facts(self) -> dict[str, object]:
        with self._lock:
            return {"asked": dict(self.asked), "weather": asdict(self.weather)}

    def call(self, given: Parameters) -> tuple[str, bool]:
        """Return the result's XML, and whether the answer gets lost. Raise Fault if the call is rejected."""
        with self._lock:
            action = given.get("Action", "")
            self.asked[action] += 1
            self._check(given)
            if self.weather.stop_after == 0 or self.rng.random() < self.weather.throttle:
                self.asked["503"] += 1
                raise Fault(
                    503,
                    "ServiceUnavailable",
                    "Service Amazon SimpleDB is currently unavailable. Please try again later",
                )
            self.weather.stop_after -= self.weather.stop_after > 0
            if action not in self._actions:
                raise Fault(400, "InvalidAction", f"The action {action} is not valid for this web service.")
            result = self._actions[action](given)
            lost = self.rng.random() < self.weather.lose
            self.asked["lost"] += lost
            return result, lost

    def _check(self, given: Parameters) -> None:
        if given.get("Version") != VERSION:
            raise Fault(400, "NoSuchVersion", f"Only version {VERSION} is supported")
        if not given.get("AWSAccessKeyId") or not given.get("Signature"):
            raise Fault(
                403, "AuthMissingFailure", "AWS was not able to authenticate the request: access keys are missing."
            )
        if given.get("SignatureVersion") != "2":
            raise Fault(400, "InvalidParameterValue", "Only signature version 2 is supported")

    # --- Domains ----------------------------------------------------------------------------------

    def _create_domain(self, given: Parameters) -> str:
        name = _needed(given, "DomainName")
        if not _DOMAIN.fullmatch(name):
            raise Fault(400, "InvalidParameterValue", f"Value ({name}) for parameter DomainName is invalid.")
        if name not in self._domains and len(self._domains) >= MAX_DOMAINS:
            raise Fault(409, "NumberDomainsExceeded", "Number of domains limit exceeded")
        self._domains.setdefault(name, Domain(self.rng))
        return ""

    def _delete_domain(self, given: Parameters) -> str:
        self._domains.pop(_needed(given, "DomainName"), None)
        return ""

    def _list_domains(self, given: Parameters) -> str:
        most = int(given.get("MaxNumberOfDomains", "100"))
        if not 1 <= most <= 100:
            raise Fault(
                400, "InvalidParameterValue", "Value for parameter MaxNumberOfDomains must be between 1 and 100"
            )
        left = sorted(name for name in self._domains if name > given.get("NextToken", ""))
        names = "".join(_tag("DomainName", name) for name in left[:most])
        return names + (_tag("NextToken", left[most - 1]) if len(left) > most else "")

    def _domain_metadata(self, given: Parameters) -> str:
        facts = self._domain(given).facts()
        return "".join(_tag(k, str(v)) for k, v in facts.items()) + _tag("Timestamp", "1700000000")

    def _domain(self, given: Parameters, name: str | None = None) -> Domain:
        found = self._domains.get(name or _needed(given, "DomainName"))
        if found is None:
            raise Fault(400, "NoSuchDomain", "The specified domain does not exist.")
        found.lag_s = self.weather.lag_s
        found.max_attributes = int(self.weather.max_attributes)
        found.max_bytes = int(self.weather.max_bytes)
        return found

    # --- Items ------------------------------------------------------------------------------------

    def _put(self, given: Parameters) -> str:
        domain, name = self._domain(given), _needed(given, "ItemName")
        domain.check(name, _expected(given))
        domain.put([(name, _puts(given, ""))])
        return ""

    def _batch_put(self, given: Parameters) -> str:
        domain = self._domain(given)
        names = _batch(given)
        domain.put([(name, _puts(given, f"Item.{n}.")) for n, name in names])
        return ""

    def _delete(self, given: Parameters) -> str:
        domain, name = self._domain(given), _needed(given, "ItemName")
        domain.check(name, _expected(given))
        domain.delete(name, _deletes(given, ""))
        return ""

    def _batch_delete(self, given: Parameters) -> str:
        domain = self._domain(given)
        for n, name in _batch(given):
            domain.delete(name, _deletes(given, f"Item.{n}."))
        return ""

    def _get(self, given: Parameters) -> str:
        domain, name = self._domain(given), _needed(given, "ItemName")
        seen = domain.seen(consistent=self._is_consistent(given))
        wanted = {given[key] for key in given if key.startswith("AttributeName.")}
        return _attributes({k: v for k, v in seen.get(name, {}).items() if not wanted or k in wanted})

    def _select(self, given: Parameters) -> str:
        try:
            query = parse(_needed(given, "SelectExpression"))
        except SelectError as error:
            raise Fault(400, error.code, str(error)) from error
        domain = self._domain(given, query.domain)
        at_most = self.rng.choice((0, 1, 3)) if self.rng.random() < self.weather.short else None
        page, count, token = domain.select(
            query, given.get("NextToken"), consistent=self._is_consistent(given), at_most=at_most
        )
        if query.counts:
            counted = f"<Attribute>{_tag('Name', 'Count')}{_tag('Value', str(count))}</Attribute>"
            items = f"<Item>{_tag('Name', 'Domain')}{counted}</Item>"
        else:
            items = "".join(f"<Item>{_tag('Name', name)}{_attributes(item)}</Item>" for name, item in page)
        return items + (_tag("NextToken", token) if token else "")

    def _is_consistent(self, given: Parameters) -> bool:
        consistent = given.get("ConsistentRead", "false") == "true"
        self.asked["eventually consistent reads"] += not consistent
        return consistent


# --- Parameters, and XML --------------------------------------------------------------------------


def _needed(given: Parameters, name: str) -> str:
    if not given.get(name):
        raise Fault(400, "MissingParameter", f"The request must contain the parameter {name}.")
    return given[name]


def _numbers(given: Parameters, prefix: str, suffix: str) -> list[int]:
    pattern = re.compile(re.escape(prefix) + r"(\d+)" + re.escape(suffix))
    return sorted(int(found[1]) for key in given if (found := pattern.fullmatch(key)))


def _batch(given: Parameters) -> list[tuple[int, str]]:
    names = [(n, given[f"Item.{n}.ItemName"]) for n in _numbers(given, "Item.", ".ItemName")]
    if not names:
        raise Fault(400, "MissingParameter", "No items specified")
    if len(names) > MAX_BATCH:
        raise Fault(409, "NumberSubmittedItemsExceeded", "Too many items in a single call. Up to 25 items")
    if len({name for _, name in names}) < len(names):
        raise Fault(400, "DuplicateItemName", "Item was specified more than once")
    return names


def _puts(given: Parameters, prefix: str) -> list[Put]:
    return [
        Put(
            given[f"{prefix}Attribute.{n}.Name"],
            _needed_value(given, f"{prefix}Attribute.{n}.Value"),
            given.get(f"{prefix}Attribute.{n}.Replace", "false") == "true",
        )
        for n in _numbers(given, f"{prefix}Attribute.", ".Name")
    ]


def _needed_value(given: Parameters, name: str) -> str:
    if name not in given:
        raise Fault(400, "MissingParameter", f"Attribute.Value missing for {name}")
    return given[name]


def _deletes(given: Parameters, prefix: str) -> list[tuple[str, str | None]]:
    return [
        (given[f"{prefix}Attribute.{n}.Name"], given.get(f"{prefix}Attribute.{n}.Value"))
        for n in _numbers(given, f"{prefix}Attribute.", ".Name")
    ]


def _expected(given: Parameters) -> Expected | None:
    if "Expected.Name" not in given:
        return None
    exists = given.get("Expected.Exists")
    return Expected(given["Expected.Name"], given.get("Expected.Value"), None if exists is None else exists == "true")


def _tag(name: str, text: str) -> str:
    if _RESTRICTED.search(text):
        return f'<{name} encoding="base64">{base64.b64encode(text.encode()).decode()}</{name}>'
    return f"<{name}>{escape(text)}</{name}>"


def _attributes(item: Item) -> str:
    return "".join(
        f"<Attribute>{_tag('Name', name)}{_tag('Value', value)}</Attribute>"
        for name, values in item.items()
        for value in sorted(values)
    )


def _answer(action: str, result: str) -> str:
    if action in _WITH_RESULT:
        result = f"<{action}Result>{result}</{action}Result>"
    facts = f"<RequestId>{uuid.uuid4()}</RequestId><BoxUsage>0.0000219907</BoxUsage>"
    return (
        f'<?xml version="1.0"?><{action}Response xmlns="{_XML}">{result}'
        f"<ResponseMetadata>{facts}</ResponseMetadata></{action}Response>"
    )


def _error(fault: Fault) -> str:
    code = f"<Code>{fault.code}</Code><Message>{escape(str(fault))}</Message>"
    return (
        '<?xml version="1.0"?><Response><Errors><Error>'
        f"{code}<BoxUsage>0.0000219907</BoxUsage></Error></Errors>"
        f"<RequestID>{uuid.uuid4()}</RequestID></Response>"
    )


# --- HTTP -----------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """The handler of one connection."""

    protocol_version = "HTTP/1.1"
    # The handler sends headers and body at once in one packet. Otherwise, each answer waits 40 ms for the
    # acknowledgment of the client.
    wbufsize = -1
    disable_nagle_algorithm = True
    service: Service

    def do_GET(self) -> None:
        if self.path.startswith("/_fake"):
            self._say(200, json.dumps(self.service.facts()))
        else:
            self._serve(urlsplit(self.path).query)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", "0"))
        body = self.rfile.read(length)
        if self.path.startswith("/_fake"):
            known = {field.name for field in fields(Weather)}
            changes = json.loads(body)
            assert known.issuperset(changes), changes
            self.service.set_weather(**changes)
            self._say(200, "{}")
        elif length > MAX_REQUEST:
            self._say(400, _error(Fault(400, "InvalidParameterValue", "The request is over 1 MB.")))
        else:
            self._serve(body.decode())

    def _serve(self, text: str) -> None:
        given = dict(parse_qsl(text, keep_blank_values=True))
        try:
            result, lost = self.service.call(given)
        except Fault as fault:
            self._say(fault.status, _error(fault))
            return
        if lost:
            self.close_connection = True
            self.connection.close()
            return
        self._say(200, _answer(given["Action"], result))

    def _say(self, status: int, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Write no log, because the tests read only the answers."""


class Server(ThreadingHTTPServer):
    """A server that listens on a port of 127.0.0.1."""

    daemon_threads = True
    request_queue_size = 64


def main(port: int) -> None:
    """Serve until the process ends."""
    handler = type("OneService", (Handler,), {"service": Service()})
    Server(("127.0.0.1", port), handler).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]))
