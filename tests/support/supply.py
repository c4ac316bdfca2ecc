"""The packages that an installation of batchlab contains, and their licenses.

    python -m tests.support.supply FILE

writes a bill of materials (CycloneDX, JSON) with the packages of uv.lock, the vendored files of
other projects, and their licenses. Invariant: the bill contains the license that the package declares. An
unknown license is written as declared, and the tests do not allow unknown licenses.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from batchlab.core import installation
from tests.support import ROOT

EXTRAS = ("aws", "docker", "ministack", "otel")
VENDOR = Path(installation.__file__).parent.parent / "server" / "web" / "static" / "vendor"

ALLOWED = frozenset(
    {
        "0BSD",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "ISC",
        "MIT",
        "PSF-2.0",
        # The following licenses apply to a file, or to a library that batchlab uses unchanged and that a user may
        # replace.
        "MPL-2.0",
        "LGPL-3.0-only",
    }
)

_IN_SPDX: Mapping[str, str] = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "Dual License": "Apache-2.0 OR BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "ISC License": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
"""SPDX names of the licenses that packages declare in another form."""


def runtime() -> Iterator[metadata.Distribution]:
    """Yield the installed distributions of batchlab, its extras, and all of their dependencies."""
    seen: set[tuple[str, str]] = set()
    waiting = [("batchlab", extra) for extra in ("", *EXTRAS)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found = metadata.distribution(name)
        if not extra:
            yield found
        for wanted in map(Requirement, found.requires or ()):
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                named = canonicalize_name(wanted.name)
                waiting += [(named, one) for one in ("", *wanted.extras)]


def licence(found: metadata.Distribution) -> str:
    """Return the declared SPDX expression of a package, or an SPDX expression with the same meaning."""
    told = found.metadata
    (expression,) = told.get_all("License-Expression", [""])
    if expression:
        return str(expression)
    short = str(told.get_all("License", [""])[0]).strip()
    if short and len(short) < 40:  # some packages have the whole license text in this field
        return _IN_SPDX.get(short, short)
    names = {
        one.rpartition(" :: ")[2] for one in told.get_all("Classifier", []) if one.startswith("License :: OSI Approved")
    }
    return " AND ".join(sorted(_IN_SPDX.get(name, name) for name in names))


def is_allowed(expression: str) -> bool:
    """Return whether batchlab can comply with a license expression: each part of an AND, or one part of an OR."""
    return bool(expression) and all(
        any(one.strip(" ()") in ALLOWED for one in part.split(" OR ")) for part in expression.split(" AND ")
    )


def vendored() -> list[dict[str, str]]:
    """Return the name, version, license, file, and sha256 of each vendored file."""
    found: list[dict[str, str]] = json.loads((VENDOR / "versions.json").read_text())
    return found


def bill(uv: str) -> dict[str, Any]:
    """Return the bill of materials."""
    exported = subprocess.run(
        [uv, "export", "-q", "--project", str(ROOT), "--preview-features", "sbom-export",
         "--frozen", "--no-dev", "--all-extras", "--format", "cyclonedx1.5"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        env={name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"},
    ).stdout  # fmt: skip
    made: dict[str, Any] = json.loads(exported)
    licences = {str(canonicalize_name(one.name)): licence(one) for one in runtime()}
    made["metadata"]["component"]["licenses"] = [{"expression": licences["batchlab"]}]
    for one in made["components"]:
        # Packages for other platforms are not installed here, so their licenses are unknown.
        if told := licences.get(canonicalize_name(one["name"])):
            one["licenses"] = [{"expression": told}]
    made["components"] += [
        {
            "type": "file",
            "bom-ref": f"vendored/{one['file']}",
            "name": one["file"],
            "version": one["version"],
            "purl": f"pkg:npm/{one['name']}@{one['version']}",
            "hashes": [{"alg": "SHA-256", "content": one["sha256"]}],
            "licenses": [{"expression": one["licence"]}],
        }
        for one in vendored()
    ]
    return made


def main() -> None:
    uv = os.environ.get("BATCHLAB_UV") or shutil.which("uv")
    if len(sys.argv) != 2 or uv is None:
        sys.exit("Usage: python -m tests.support.supply FILE, with uv on the path or in BATCHLAB_UV")
    made = bill(uv)
    Path(sys.argv[1]).write_text(json.dumps(made, indent=1) + "\n")
    print(f"{sys.argv[1]}: {len(made['components'])} components")


if __name__ == "__main__":
    main()
