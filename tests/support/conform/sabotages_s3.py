"""Changes of the behavior of S3, one rule each, and the checks that must notice each change."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping

from tests.support.conform.proxy import Request, Response, Sabotage, Send


def _puts_lose_their_condition(request: Request, send: Send) -> Response:
    if request.method == "PUT":
        request.headers.pop("if-none-match", None)
    return send(request)


def _multipart_uploads_lose_their_condition(request: Request, send: Send) -> Response:
    if request.method == "POST":
        request.headers.pop("if-none-match", None)
    return send(request)


def _overwrites_lose_their_condition(request: Request, send: Send) -> Response:
    if request.method == "PUT":
        request.headers.pop("if-match", None)
    return send(request)


def _a_lost_race_is_an_outage(request: Request, send: Send) -> Response:
    answer = send(request)
    if answer.status == 412:
        return Response(500, b"<Error><Code>InternalError</Code></Error>")
    return answer


def _reads_lose_their_condition(request: Request, send: Send) -> Response:
    if request.method == "GET":
        request.headers.pop("if-none-match", None)
    return send(request)


def _ranges_are_ignored(request: Request, send: Send) -> Response:
    request.headers.pop("range", None)
    return send(request)


def _object_deletes_are_swallowed(request: Request, send: Send) -> Response:
    if request.method == "DELETE" and request.is_object and not request.query:
        return Response(204)
    return send(request)


class _ReadsAreStale:
    """A sabotage that returns the first read value of an object forever."""

    def __init__(self) -> None:
        self._seen: dict[str, Response] = {}
        self._lock = threading.Lock()

    def __call__(self, request: Request, send: Send) -> Response:
        if request.method != "GET" or not request.is_object or request.headers.get("range"):
            return send(request)
        answer = send(request)
        if answer.status != 200:
            return answer
        with self._lock:
            return self._seen.setdefault(request.path, answer)


def _listings_end_after_a_page(request: Request, send: Send) -> Response:
    answer = send(request)
    if "list-type=2" in request.query:
        answer.body = answer.body.replace(b"<IsTruncated>true</IsTruncated>", b"<IsTruncated>false</IsTruncated>")
    return answer


def _listings_begin_at_the_beginning(request: Request, send: Send) -> Response:
    request.path = re.sub(r"&?start-after=[^&]*", "", request.path)
    return send(request)


def _listings_are_reversed(request: Request, send: Send) -> Response:
    answer = send(request)
    found = re.findall(rb"<Contents>.*?</Contents>", answer.body, re.DOTALL)
    if "list-type=2" in request.query and found:
        start, end = answer.body.index(found[0]), answer.body.rindex(found[-1]) + len(found[-1])
        answer.body = answer.body[:start] + b"".join(reversed(found)) + answer.body[end:]
    return answer


def _pages_begin_anew(request: Request, send: Send) -> Response:
    request.path = re.sub(r"&?continuation-token=[^&]*", "", request.path)
    return send(request)


def _objects_are_damaged(request: Request, send: Send) -> Response:
    answer = send(request)
    if request.method == "GET" and request.is_object and answer.status in (200, 206):
        answer.body = answer.body[:-1] + b"?"
    return answer


def _empty_objects_are_none(request: Request, send: Send) -> Response:
    if request.method == "PUT" and request.is_object and not request.body:
        return Response(200, b"", {"ETag": '"0"'})
    return send(request)


def _what_is_missing_cannot_be_deleted(request: Request, send: Send) -> Response:
    if request.method == "DELETE" and request.is_object:
        return Response(404, b"<Error><Code>NoSuchKey</Code></Error>")
    return send(request)


def _one_is_deleted_of_many(request: Request, send: Send) -> Response:
    if request.method == "POST" and request.query.startswith("delete"):
        request.body = re.sub(rb"(</Object>).*</Object>", rb"\1", request.body, flags=re.DOTALL)
    return send(request)


def _listings_have_etags_of_their_own(request: Request, send: Send) -> Response:
    answer = send(request)
    if "list-type=2" in request.query:
        answer.body = re.sub(rb"<ETag>[^<]*</ETag>", b"<ETag>0</ETag>", answer.body)
    return answer


def _nothing_ever_changes(request: Request, send: Send) -> Response:
    if request.method == "GET" and "if-none-match" in request.headers:
        return Response(304)
    return send(request)


def _prefixes_are_folders(request: Request, send: Send) -> Response:
    request.path = re.sub(r"(prefix=[^&]*)%2F[^&]*", r"\1%2F", request.path)
    return send(request)


def _keys_have_no_case(request: Request, send: Send) -> Response:
    if request.is_object:
        path, mark, query = request.path.partition("?")
        request.path = path.lower() + mark + query
    return send(request)


def _etags_never_change(request: Request, send: Send) -> Response:
    answer = send(request)
    if "ETag" in answer.headers:
        answer.headers["ETag"] = '"0"'
    return answer


def _what_is_missing_is_empty(request: Request, send: Send) -> Response:
    answer = send(request)
    return Response(200, b"", {"ETag": '"0"'}) if answer.status == 404 else answer


S3_SABOTAGES: Mapping[str, tuple[Sabotage, set[str]]] = {
    "puts lose their condition": (
        _puts_lose_their_condition,
        {"s3-create-taken", "s3-create-repeated", "s3-create-race", "s3-port-create"},
    ),
    "multipart uploads lose their condition": (_multipart_uploads_lose_their_condition, {"s3-multipart-create-taken"}),
    "overwrites lose their condition": (_overwrites_lose_their_condition, {"s3-match-stale", "s3-match-missing"}),
    "a lost race is an outage": (_a_lost_race_is_an_outage, {"s3-create-taken", "s3-create-race"}),
    "reads lose their condition": (_reads_lose_their_condition, {"s3-get-unchanged", "s3-port-unchanged"}),
    "ranges are ignored": (_ranges_are_ignored, {"s3-range", "s3-range-cut", "s3-port-ranges"}),
    "object deletes are swallowed": (_object_deletes_are_swallowed, {"s3-read-own-delete", "s3-create-after-delete"}),
    "reads are stale": (_ReadsAreStale(), {"s3-read-own-overwrite", "s3-multipart-unseen"}),
    "listings end after a page": (
        _listings_end_after_a_page,
        {"s3-list-pages", "s3-list-1000", "s3-list-pages-unicode"},
    ),
    "pages begin anew": (_pages_begin_anew, {"s3-list-changing"}),
    "objects are damaged": (
        _objects_are_damaged,
        {
            "s3-create-free",
            "s3-overwrite-whole",
            "s3-multipart-whole",
            "s3-port-upload",
            "s3-read-own-write",
            "s3-multipart-create-free",
        },
    ),
    "empty objects are none": (_empty_objects_are_none, {"s3-put-empty"}),
    "what is missing cannot be deleted": (_what_is_missing_cannot_be_deleted, {"s3-delete-missing"}),
    "one is deleted of many": (_one_is_deleted_of_many, {"s3-delete-many"}),
    "listings have etags of their own": (_listings_have_etags_of_their_own, {"s3-etag-agrees"}),
    "nothing ever changes": (_nothing_ever_changes, {"s3-get-changed"}),
    "listings begin at the beginning": (_listings_begin_at_the_beginning, {"s3-list-after"}),
    "listings are reversed": (_listings_are_reversed, {"s3-list-order", "s3-port-list"}),
    "what is missing is empty": (_what_is_missing_is_empty, {"s3-get-missing", "s3-head-missing", "s3-port-missing"}),
    "prefixes are folders": (_prefixes_are_folders, {"s3-list-prefix"}),
    "keys have no case": (_keys_have_no_case, {"s3-keys-odd", "s3-port-keys"}),
    "etags never change": (_etags_never_change, {"s3-etag-changes", "s3-port-unchanged"}),
}
