"""An image registry with one image in the format of `docker save`. The registry serves pulls over TLS to clients that
have the password of the user AWS.

This file is a script for a container, and imports only the standard library. The image is /registry/image.tar. The
certificate and its key are server.crt and server.key in the same folder. REGISTRY_PASSWORD is the password. The script
prints each request as a line on stdout.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import ssl
import tarfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO

_OCI = "application/vnd.oci.image"
_PIECE = 1024 * 1024


class Image:
    """The manifest of an image, and the position of each blob in the archive by digest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blobs: dict[str, tuple[int, int]] = {}
        """The offset and the size of each blob in the archive, by digest."""
        with tarfile.open(path) as archive:
            told = archive.extractfile("manifest.json")
            assert told
            (listed,) = json.load(told)
            config = self._blob(archive, listed["Config"], f"{_OCI}.config.v1+json")
            layers = [self._blob(archive, name, f"{_OCI}.layer.v1.tar") for name in listed["Layers"]]
        self.type = f"{_OCI}.manifest.v1+json"
        self.manifest = json.dumps(
            {"schemaVersion": 2, "mediaType": self.type, "config": config, "layers": layers}
        ).encode()
        self.digest = f"sha256:{hashlib.sha256(self.manifest).hexdigest()}"

    def _blob(self, archive: tarfile.TarFile, name: str, kind: str) -> dict[str, object]:
        member = archive.getmember(name)
        body = archive.extractfile(member)
        assert body
        digest = f"sha256:{hashlib.file_digest(body, 'sha256').hexdigest()}"  # type: ignore[arg-type]
        # In some archives, a duplicate layer is a link to the first one.
        place = archive.getmember(member.linkname) if member.islnk() or member.issym() else member
        self.blobs[digest] = place.offset_data, place.size
        return {"mediaType": kind, "digest": digest, "size": place.size}


class Registry(BaseHTTPRequestHandler):
    """The pull requests of https://distribution.github.io/distribution/spec/api/."""

    protocol_version = "HTTP/1.1"
    image: Image
    password: str

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        kind, _, name = self.path.removeprefix("/v2/").partition("/")[2].rpartition("/")
        known = f"Basic {base64.b64encode(f'AWS:{self.password}'.encode()).decode()}"
        if self.headers["Authorization"] != known:
            self._send(401, b"", {"WWW-Authenticate": 'Basic realm="registry"'})
        elif self.path == "/v2/":
            self._send(200, b"{}", {})
        elif kind.endswith("manifests") and name in ("1", self.image.digest):
            facts = {"Content-Type": self.image.type, "Docker-Content-Digest": self.image.digest}
            self._send(200, self.image.manifest, facts)
        elif kind.endswith("blobs") and name in self.image.blobs:
            offset, size = self.image.blobs[name]
            with self.image.path.open("rb") as file:
                file.seek(offset)
                self._send(200, file, {"Docker-Content-Digest": name}, size)
        else:
            self._send(404, b"", {})

    def _send(self, status: int, body: bytes | IO[bytes], facts: dict[str, str], size: int = 0) -> None:
        left = len(body) if isinstance(body, bytes) else size
        self.send_response(status)
        for name, value in {"Content-Length": str(left), **facts}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(body, bytes):
            self.wfile.write(body)
            return
        while left:
            piece = body.read(min(left, _PIECE))
            self.wfile.write(piece)
            left -= len(piece)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        print(f"{code} {self.command} {self.path}", flush=True)


def main() -> None:
    folder = Path("/registry")
    Registry.image = Image(folder / "image.tar")
    Registry.password = os.environ["REGISTRY_PASSWORD"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    with ThreadingHTTPServer(("", 443), Registry) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        print("ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
