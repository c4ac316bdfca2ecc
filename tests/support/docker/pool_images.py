"""Images for pools, each with a tool that no other image has."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from batchlab.runtime.compose_project import check_reference

BASE_IMAGE = os.environ.get("BATCHLAB_BASE_IMAGE", "python:3.13-slim")

JOB = """\
name: two-images

input:
  files: data/*.txt
  split: file

stages:
  - name: cut
    pool: cutters
    command: [cut-tool, "{input}", "{output:cut.txt}"]
  - name: join
    pool: joiners
    command: [join-tool, "{input}", "{output:joined.txt}"]
"""


def build_image(name: str, tools: Mapping[str, str], *more: str) -> str:
    """Build an image from the base image with shell scripts as `tools` and more lines of a Dockerfile."""
    lines = [f"FROM {BASE_IMAGE}", "ENV TOOL_HOME=/opt/tools", "ENV PATH=/opt/tools:$PATH", *more]
    for tool, script in tools.items():
        body = "\\n".join(["#!/bin/sh", *script.splitlines()])
        lines.append(
            f"RUN mkdir -p /opt/tools && printf '{body}\\n' > /opt/tools/{tool} && chmod 755 /opt/tools/{tool}"
        )
    subprocess.run(
        ["docker", "build", "-q", "-t", name, "-"],
        input="\n".join(lines) + "\n",
        text=True,
        check=True,
        capture_output=True,
        env={**os.environ, "DOCKER_BUILDKIT": "1"},
    )
    return name


def two_images(prefix: str) -> tuple[str, str]:
    """Build the images of the pools `cutters` and `joiners`. `cut-tool` and `join-tool` are each in one image only."""
    cut = 'if command -v join-tool; then exit 9; fi; cut -c1-3 "$1" > "$2"'
    join = 'if command -v cut-tool; then exit 9; fi; tr "\\\\n" "+" < "$1" > "$2"'
    return (
        build_image(f"{prefix}/cutters:1", {"cut-tool": cut}),
        build_image(f"{prefix}/joiners:1", {"join-tool": join}),
    )


def write_job(folder: Path) -> Path:
    """Write the job file of a job whose stages need the tools of two images, and its input."""
    (folder / "data").mkdir(parents=True)
    for number in range(3):
        (folder / "data" / f"{number}.txt").write_text(f"abcdef{number}\nghijkl{number}\n")
    (folder / "job.yaml").write_text(JOB)
    return folder / "job.yaml"


def remove_images(*names: str) -> None:
    check_reference("image", "rm", "--force", *names)
