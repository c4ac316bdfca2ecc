"""Errors of the emulated AWS services: `Fault`, and its HTTP status from the service model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from botocore.model import ServiceModel

_COMMON = {
    "AccessDenied": 403,
    "IncompleteSignature": 400,
    "InternalFailure": 500,
    "InvalidClientTokenId": 403,
    "MissingAuthenticationToken": 403,
    "NotImplemented": 501,
    "RequestEntityTooLarge": 413,
    "SignatureDoesNotMatch": 403,
    "Throttling": 400,
}
"""HTTP status of the errors that every service has and that its model does not list. Other errors
have status 400."""


class Fault(Exception):
    """Error answer of a service. `code` is AWS's error code, and `message` is a sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


def invalid(message: str) -> Fault:
    """Return the fault for a well-formed request that cannot be performed."""
    return Fault("ValidationError", message)


@dataclass(frozen=True, slots=True)
class Blame:
    """HTTP status of a fault, and whether the sender caused it."""

    status: int
    is_senders: bool


class Faults:
    """Statuses of the faults of one service, by their code."""

    def __init__(self, service: ServiceModel) -> None:
        self._known = {code: Blame(status, status < 500) for code, status in _COMMON.items()}
        for shape in service.error_shapes:
            error = shape.metadata.get("error", {})
            status = int(error.get("httpStatusCode", 400))
            is_senders = bool(error.get("senderFault", status < 500))
            self._known[error.get("code", shape.name)] = Blame(status, is_senders)

    def blame(self, fault: Fault) -> Blame:
        return self._known.get(fault.code, Blame(400, True))


@contextmanager
def sent_wrong(where: str) -> Iterator[None]:
    """Convert a ValueError or OverflowError of a value at `where` into AWS's fault for malformed
    input."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise Fault("MalformedInput", f"The value at {where!r} cannot be read.") from error
