"""The page's static files, as they were shipped.

Invariant: what is served is a file of this package's `static` folder, and nothing else.
"""

from __future__ import annotations

from importlib.resources import files

from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

_TYPES = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


class Assets:
    """Serves them, read once."""

    def __init__(self) -> None:
        self._known: dict[str, Response] = {}
        root = files("batchlab.web") / "static"
        for prefix, folder in (("", root), ("vendor/", root / "vendor")):
            for one in folder.iterdir():
                kind = _TYPES.get(one.name.rpartition(".")[2])
                if kind and one.is_file():
                    # No cache: after an upgrade the page must not meet yesterday's script.
                    headers = {"Cache-Control": "no-cache", "Content-Type": kind}
                    self._known[prefix + one.name] = Response(one.read_bytes(), headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path"].removeprefix(scope.get("root_path", "")).lstrip("/")
        found = self._known.get(name) if scope["method"] in ("GET", "HEAD") else None
        await (found or PlainTextResponse("There is no such file.\n", 404))(scope, receive, send)
