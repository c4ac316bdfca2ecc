"""Boot script of an instance, with folders below a temporary folder and stubs of the machine's programs."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from batchlab.core import installation

BOOT = installation.folder("backends") / "aws" / "boot"
IMAGE = "registry.example/tools:1"
STUBS = {
    "aws": "",
    "docker": """
echo "docker $*" >> "$CALLS"
case $1 in
  image) exit 1 ;; # the machine has no images
  pull) if [ -n "$PULL_ERROR" ]; then echo "$PULL_ERROR" >&2; exit 1; fi ;;
esac""",
    "id": 'echo 991; [ "$1" = -u ] || [ "$1" = -g ]',
    # Only root can set the owner of a file.
    "install": """
kept=()
while [ $# -gt 0 ]; do
  case $1 in -o | -g) shift ;; *) kept+=("$1") ;; esac
  shift
done
exec /usr/bin/install "${kept[@]}\"""",
    "sleep": "",
    "systemctl": 'echo "systemctl $*" >> "$CALLS"',
    "useradd": "",
}
TOOLKIT = "nvidia-container-runtime-hook"


@dataclass(frozen=True)
class Machine:
    """A machine that boots with the settings of a stack. The script's folders are below `root`."""

    root: Path

    @property
    def calls(self) -> str:
        """Calls of Docker and systemd."""
        return (self.root / "calls").read_text()

    @property
    def unit(self) -> str:
        """Changes of the worker's unit for the container."""
        return (self.root / "etc/systemd/system/batchlab-worker.service.d/container.conf").read_text()

    def add(self, program: str, script: str) -> None:
        path = self.root / "bin" / program
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def boot(self, pull_error: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
        """Run the boot script of a worker with the settings of the user data."""
        lines = {"LOG_GROUP": "", "REGION": "eu-central-1", "POOL_IMAGE": IMAGE, **settings}
        (self.root / "opt/batchlab/boot/settings").write_text("".join(f"{k}='{v}'\n" for k, v in lines.items()))
        (self.root / "calls").write_text("")
        env = {"PATH": f"{self.root / 'bin'}:/usr/bin:/bin", "CALLS": str(self.root / "calls")}
        return subprocess.run(
            [self.root / "opt/batchlab/release/boot.sh", "worker"],
            env={**env, "PULL_ERROR": pull_error},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Create a machine without images and without GPUs."""
    made = Machine(tmp_path)
    for folder in ("bin", "opt/batchlab/boot", "etc/systemd/system", "var/log", "var/lib"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copytree(BOOT, tmp_path / "opt/batchlab/release")
    release = tmp_path / "opt/batchlab/release"
    (release / "version").write_text(f"VERSION=1\nPYTHON=3.12\nARCHITECTURE={os.uname().machine}\n")
    (release / "wheels").mkdir()
    (release / "wheels/pip-1-py3-none-any.whl").write_text("")
    (release / "pool-image").mkdir()
    (release / "pool-image/of").write_text(f"{IMAGE}\n")  # the installation into an image needs Docker
    (tmp_path / "opt/batchlab/boot/deployment.json").write_text("{}")
    script = (release / "boot.sh").read_text()
    for folder in ("/opt/", "/etc/", "/var/lib/", "/var/log/"):
        script = script.replace(folder, f"{tmp_path}{folder}")
    (release / "boot.sh").write_text(script)
    for program, text in STUBS.items():
        made.add(program, text)
    return made


@pytest.mark.parametrize("variable", ["POOL_IMAGE", "CONTAINER_IMAGE"])
def test_container_gets_the_gpus_of_its_pool(machine: Machine, variable: str) -> None:
    machine.add(TOOLKIT, "")
    done = machine.boot(**{"POOL_IMAGE": "", variable: IMAGE, "GPUS": "2"})
    assert (done.returncode, done.stderr) == (0, "")
    (start,) = [line for line in machine.unit.splitlines() if line.startswith("ExecStart=/usr/bin/docker run")]
    assert " --gpus all " in start.rpartition(f" {IMAGE} ")[0] + " "
    assert "systemctl start batchlab-worker.service" in machine.calls


@pytest.mark.parametrize("gpus", [{"GPUS": "0"}, {}])
def test_container_of_a_pool_without_gpus_gets_none(machine: Machine, gpus: dict[str, str]) -> None:
    """The settings of an earlier release do not have the number of GPUs."""
    assert machine.boot(**gpus).returncode == 0
    assert "--gpus" not in machine.unit


def test_missing_toolkit_is_one_sentence(machine: Machine) -> None:
    done = machine.boot(GPUS="1")
    assert done.returncode == 1
    assert done.stderr == (
        "the machine image has no NVIDIA Container Toolkit, so the workers' container cannot use the GPUs of the pool: "
        "set WorkerImage to an AMI with the toolkit, such as AWS's Deep Learning Base AMI\n"
    )
    assert machine.calls == "", "neither Docker nor the worker is started"


def test_image_that_cannot_be_pulled_is_one_sentence(machine: Machine) -> None:
    reason = "manifest for registry.example/tools:1 not found"
    done = machine.boot(pull_error=reason)
    assert done.returncode == 1
    assert machine.calls.count("docker pull") == 6
    *_, before, last = done.stderr.splitlines()
    assert before == reason
    assert last == f"the image {IMAGE} cannot be pulled, and Docker's message above has the reason"
    assert "systemctl start batchlab-worker" not in machine.calls
