"""Authentication of an httpx client that signs the client's requests to a manager."""

from __future__ import annotations

from collections.abc import Generator

import httpx

from batchlab.core import http_connections
from batchlab.core.http_connections import PROOF, Expected, Unproven


class Signing(httpx.Auth):
    """Authentication that signs each request with the grid's token, and checks the signature of each answer."""

    requires_request_body = True
    requires_response_body = True

    def __init__(self, token: str) -> None:
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        target = request.url.raw_path.decode("ascii")
        signed = http_connections.sign(self._token, request.method, target, request.content)
        request.headers["Authorization"] = signed.header
        response = yield request
        try:
            status, proof = response.status_code, response.headers.get(PROOF)
            Expected(self._token, signed, status, proof).check_answer(response.content)
        except Unproven:
            message = "The program that answered does not prove that it is the manager."
            raise httpx.RemoteProtocolError(message, request=request) from None
