"""What a service of AWS answers with where it refuses: `Fault`, and how the model describes it."""

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
"""HTTP status of the errors that every service has and its model does not list; others are 400."""


class Fault(Exception):
    """An answer that refuses: `code` is AWS's name for why, `message` a sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


def invalid(message: str) -> Fault:
    """The request is well formed, and cannot be done."""
    return Fault("ValidationError", message)


@dataclass(frozen=True, slots=True)
class Blame:
    """How a fault is told: HTTP status, and whether it is the sender's."""

    status: int
    is_senders: bool


class Faults:
    """The faults of one service, by their code."""

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
    """Turns a value that is none of its type into AWS's fault for that."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise Fault("MalformedInput", f"The value at {where!r} cannot be read.") from error
