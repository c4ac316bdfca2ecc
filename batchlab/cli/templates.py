"""Jobs to begin with: the starter, and the shipped examples with data that is made up for them.

Invariant: no file that is there is ever replaced.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from batchlab import package_data
from batchlab.errors import UsageError

DATA = "data"
_LEFT_OUT = {DATA, "out", "__pycache__"}
_RECORDS_BYTES = 32 * 2**20
"""Of the sort: a few seconds. The example's README makes more than its workers may hold."""
_VIDEO_S = 20


def starter_files() -> dict[str, bytes]:
    """The starter job: content by name."""
    from batchlab.spec.starter import starter

    return {name: text.encode() for name, text in starter().items()}


def example_files(name: str) -> dict[str, bytes]:
    """A shipped example without data or results; UsageError naming those there are."""
    root = package_data.folder("examples")
    names = sorted(path.parent.name for path in root.glob("*/job.yaml"))
    if name not in names:
        raise UsageError(f"There is no example {name!r}.", remedy=f"There are {', '.join(names)}.")
    return {
        path.relative_to(root / name).as_posix(): path.read_bytes()
        for path in sorted((root / name).rglob("*"))
        if path.is_file() and not _LEFT_OUT.intersection(path.relative_to(root / name).parts)
    }


def make_data(name: str, folder: Path) -> str:
    """Make up an example's input below `folder`; what it is, in a few words. UsageError where it
    cannot be made or written."""
    try:
        return _MAKERS[name](folder)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written: {error.strerror}.", remedy="Name another folder."
        ) from error


def _claims(folder: Path) -> str:
    from batchlab.datagen import write_claims

    return f"{write_claims(folder).files} files of insurance claims"


def _rides(folder: Path) -> str:
    from batchlab.datagen import write_rides

    write_rides(folder)
    return "a CSV of taxi rides"


def _records(folder: Path) -> str:
    from batchlab.datagen import write_records

    return f"{write_records(folder, size_bytes=_RECORDS_BYTES).lines:,} lines to sort"


def _video(folder: Path) -> str:
    program = shutil.which("ffmpeg")
    if program is None:
        raise UsageError(
            "The media job needs ffmpeg, which is not installed.",
            remedy="Install it (on Debian: apt-get install ffmpeg), and call this again.",
        )
    folder.mkdir(parents=True)
    target = folder / "test.mp4"
    picture = f"testsrc2=duration={_VIDEO_S}:size=640x360:rate=25"
    made = subprocess.run(
        [
            *(program, "-v", "error", "-f", "lavfi", "-i", picture),
            *("-f", "lavfi", "-i", f"sine=duration={_VIDEO_S}", "-pix_fmt", "yuv420p", target),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        told = (made.stderr.strip().splitlines() or ["it says nothing"])[-1].rstrip(".")
        raise UsageError(
            f"ffmpeg cannot make a video: {told}.",
            remedy=f"Put an .mp4 of your own into {folder}.",
        )
    return f"a video of {_VIDEO_S} s"


_MAKERS = {"claims": _claims, "transform": _rides, "media": _video, "sort": _records}


def check_free(folder: Path, names: Iterable[str]) -> None:
    """UsageError where one of the names is there already."""
    there = [name for name in names if (folder / name).exists()]
    if there:
        raise UsageError(
            f"{folder / there[0]} is there already.", remedy="Name another folder, or remove it."
        )


def write(folder: Path, files: Mapping[str, bytes]) -> list[str]:
    """Write `files` below `folder`, all or none; UsageError where one is there already."""
    check_free(folder, files)
    try:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("xb") as file:
                file.write(content)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written: {error.strerror}.", remedy="Name another folder."
        ) from error
    return list(files)
