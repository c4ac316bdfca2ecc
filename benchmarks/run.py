"""Run batchlab and its peers on this machine with the peers' harness.

    python benchmarks/run.py --harness FOLDER --peers batchlab_local,dask --workloads W1,W5

The harness is outside of this repository (see `harness.py`). The program copies the harness to a temporary folder, adds
batchlab's adapter, and runs the copy. The program writes the results to `benchmarks/results/`. Peers need their own
virtual environments in the folder --venvs, where `peers.py --install` creates the environments. batchlab runs in the
virtual environment of this project. Other options are passed to the harness. The program uses only the standard
library.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import harness

HERE = Path(__file__).resolve().parent
PEERS = {f"batchlab_{backend}": backend for backend in ("local", "ministack")}

# Code that `join` appends to the harness's registry of adapters.
_JOIN = """
for _name, _backend in %r.items():
    PEERS[_name] = ("batchlab_peer", "Batchlab", {"backend": _backend})
_venv_of, _needs = venv_of, needs
def venv_of(name):
    # The process pool is the standard library's: it needs no environment of its own.
    return "batchlab" if name.startswith(("batchlab_", "ppe")) else _venv_of(name)
def needs(name):
    return {"aws"} if name == "batchlab_ministack" else _needs(name)
"""


def main() -> None:
    """Parse the options, copy the harness, and run the copy.

    The harness prints each figure as soon as it is measured.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    harness.add_to(parser)
    parser.add_argument("--venvs", type=Path, help="the peers' virtual environments")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma list, as the harness has it")
    parser.add_argument("--workloads", default="all", help="comma list of W1 … W7N, or all")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "latest.json")
    options, others = parser.parse_known_args()
    source = harness.there(options.harness)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="batchlab-bench-") as name:
        scratch = Path(name)
        copy, venvs = scratch / "harness", scratch / "venvs"
        join(source, copy)
        venvs.mkdir()
        (venvs / "v_batchlab").symlink_to(Path(sys.prefix))
        for one in options.venvs.iterdir() if options.venvs else ():
            (venvs / one.name).symlink_to(one.resolve())
        with emulator(scratch / "emulator", options.peers.split(",")) as endpoint:
            command = [sys.executable, str(copy / "run.py"), "--peer", options.peers]
            command += ["--workload", options.workloads, "--json", str(options.json.resolve())]
            command += ["--venvs", str(venvs), "--scratch", str(scratch / "scratch")]
            command += ["--aws-endpoint", endpoint, *others]
            environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
            sys.exit(subprocess.run(command, env=environment, check=False).returncode)


def join(source: Path, copy: Path) -> None:
    """Copy the harness from `source` to `copy`, and add batchlab's adapter to the copy."""
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("results", "__pycache__"))
    for path in [copy, *copy.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)
    shutil.copy(HERE / "batchlab_peer.py", copy / "adapters")
    with (copy / "adapters" / "__init__.py").open("a") as registry:
        registry.write(_JOIN % PEERS)


@contextmanager
def emulator(folder: Path, peers: Sequence[str]) -> Iterator[str]:
    """Start MiniStack if a peer needs SQS, and yield the endpoint.

    Without such a peer, yield the address of an unused port.
    """
    if not any("sqs" in peer or peer == "batchlab_ministack" for peer in peers):
        yield "http://127.0.0.1:9"
        return
    from batchlab.adapters.aws.endpoint import Endpoint
    from batchlab.adapters.local import state_files
    from batchlab.adapters.local.ministack import Emulator, install

    # All peers sign requests with the default keys of `Endpoint`, so this MiniStack gets the default keys.
    known = Endpoint()
    pair = {"access_key": known.access_key, "secret_key": known.secret_key}
    folder.mkdir(exist_ok=True)
    (folder / state_files.KEYS_FILE).write_text(json.dumps(pair))
    with Emulator(install(print), folder) as running:
        yield running.url


if __name__ == "__main__":
    main()
