"""A proxy for AWS services that records each call and its caller."""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from tests.support.http_proxy import Answer, Request, forward

_SCOPE = re.compile(r"Credential=([^/]+)/\d+/[^/]+/([^/]+)/aws4_request")
_DENIED = (b"AccessDenied", b"not authorized")


@dataclass
class RecordingFront:
    """A proxy that records calls. `called` has the IAM actions, such as "sqs:SendMessage", by access key. `denied` has
    the calls that were denied."""

    target: str = ""
    called: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    denied: list[tuple[str, str, str]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: Request) -> Answer:
        who, action = caller(request), action_of(request)
        answer = forward(self.target, request)
        with self._lock:
            self.called[who].add(action)
            if action == "s3:GetObject" and answer.status == 404:
                # For a missing object, S3 returns 404 only to callers that may list the bucket. Other callers get 403.
                self.called[who].add("s3:ListBucket")
            if answer.status == 403 or any(word in answer.body for word in _DENIED):
                self.denied.append((who, action, request.path))
        return answer


def caller(request: Request) -> str:
    """Return the access key that signed the request, or "" if the request is not signed."""
    found = _SCOPE.search(request.header("Authorization"))
    return found[1] if found else ""


def action_of(request: Request) -> str:
    """Return the IAM action that permits the request, as in AWS's service authorization reference."""
    found = _SCOPE.search(request.header("Authorization"))
    service = found[2] if found else "?"
    if target := request.header("X-Amz-Target"):
        name = target.partition(".")[2]
        # A batch call needs the permission of the single call.
        return f"{service}:{name.removesuffix('Batch')}"
    if service == "s3":
        return f"s3:{_of_s3(request)}"
    return f"{service}:{parse_qs(request.body.decode())['Action'][0].removesuffix('Batch')}"


def _of_s3(request: Request) -> str:
    parts = urlsplit(request.path)
    query = parse_qs(parts.query, keep_blank_values=True)
    has_key = bool(parts.path.strip("/").partition("/")[2])
    if request.method == "DELETE":
        return "AbortMultipartUpload" if "uploadId" in query else "DeleteObject"
    if request.method == "POST":
        # A POST deletes several keys, or begins or completes a multipart upload.
        return "DeleteObject" if "delete" in query else "PutObject"
    if request.method == "PUT":
        return "PutObject" if has_key else "CreateBucket"
    return "GetObject" if has_key else "ListBucket"
