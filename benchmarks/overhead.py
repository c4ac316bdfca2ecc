"""Cost of containers and LocalStack: the benchmark runs the same jobs on the backends `local` and `localstack`.

    python benchmarks/overhead.py [--small] [--json FILE]

The benchmark needs Docker. Each of the two grids has two slots. The grids run a job alternately, and the benchmark
compares the medians of the durations. The table also shows the requests in LocalStack's log, the duration of one
request inside the containers' network, and the CPU time of each container. The table also shows the requests of an idle
grid per minute, with two workers and without workers.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Python adds only the script's own folder to the import path, so this line adds the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from docker import DockerClient

from batchlab.core.model import LifecycleState, Pool
from batchlab.runtime import compose_deployment
from batchlab.runtime.home import Home
from benchmarks.request_counts import cpu_s
from tests.support.docker.chaos import docker, wait_for
from tests.support.grid.local_grid import LocalGrid

SLOTS = 2
POOL = "default"
QUIET_S = 70.0
"""Wait in seconds after the last job, until the heartbeats and polls are as rare as on an idle grid."""
PYTHON = "/opt/batchlab/venv/bin/python"
SERVICES = ("localstack", "manager", "asg", "postgres")

WORK = """\
import time

def nap(seconds):
    if seconds:
        time.sleep(seconds)
"""

JOB = """\
name: nap
input: {files: items.jsonl, split: items}
stages:
  - {name: nap, python: work:nap}
"""

PROBE = """
import json, statistics, sys, time
import boto3
url, bucket, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
at = dict(endpoint_url=url, region_name="us-east-1")
at.update(aws_access_key_id="test", aws_secret_access_key="test")
s3, sqs = boto3.client("s3", **at), boto3.client("sqs", **at)
queue = sqs.create_queue(QueueName=f"{bucket}-probe")["QueueUrl"]
taken = {}
def timed(kind, call):
    begun_s = time.perf_counter()
    answer = call()
    taken.setdefault(kind, []).append((time.perf_counter() - begun_s) * 1000)
    return answer
for n in range(count):
    here = dict(Bucket=bucket, Key=f"probe/{n}")
    timed("s3.PutObject", lambda: s3.put_object(Body=b"x" * 1000, **here))
    timed("s3.GetObject", lambda: s3.get_object(**here)["Body"].read())
    timed("s3.DeleteObject", lambda: s3.delete_object(**here))
    entry = dict(Id="0", MessageBody="x" * 1000)
    timed("sqs.SendMessageBatch", lambda: sqs.send_message_batch(QueueUrl=queue, Entries=[entry]))
    got = timed("sqs.ReceiveMessage", lambda: sqs.receive_message(QueueUrl=queue))["Messages"]
    gone = [dict(Id="0", ReceiptHandle=got[0]["ReceiptHandle"])]
    timed("sqs.DeleteMessageBatch", lambda: sqs.delete_message_batch(QueueUrl=queue, Entries=gone))
sqs.delete_queue(QueueUrl=queue)
print(json.dumps({kind: statistics.median(each) for kind, each in taken.items()}))
"""


class Parts:
    """Containers of a grid on the backend `localstack`."""

    def __init__(self, home: Home) -> None:
        self.home = home
        found = compose_deployment.read(home)
        assert found
        self.project = found.project
        self._engine = DockerClient.from_env()

    def ids(self, *labels: str) -> list[str]:
        """Return the ids of the grid's running containers with all of the labels."""
        named = [word for label in labels for word in ("--filter", f"label={label}")]
        return docker("ps", "-q", "--filter", f"label=batchlab.grid={self.project}", *named).split()

    def service(self, name: str) -> str:
        """Return the id of the container that runs the Compose service `name`."""
        (found,) = self.ids(f"com.docker.compose.service={name}")
        return found

    def requests(self) -> Counter[str]:
        """Return the number of requests in LocalStack's log so far, by kind of request."""
        log = self._engine.containers.get(self.service("localstack")).logs().decode()
        found = Counter(re.findall(r"\bAWS ((?:s3|sqs)\.\w+) => ", log))
        assert found, "LocalStack does not log what it is asked"
        return found

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds of each service's container so far.

        All running instances together count as "workers".
        """
        parts = {name: [self.service(name)] for name in SERVICES}
        parts["workers"] = self.ids("batchlab.instance")
        return {name: sum(map(self._cpu_s, ids)) for name, ids in parts.items()}

    def _cpu_s(self, container: str) -> float:
        told = self._engine.api.stats(container, stream=False, one_shot=True)
        return float(told["cpu_stats"]["cpu_usage"]["total_usage"]) / 1e9

    def latency_ms(self, count: int) -> dict[str, float]:
        """Make `count` requests of each kind, one after another, in the manager's container.

        Return the median duration by kind.
        """
        place = self.home.place(compose_deployment.NAME)
        assert place
        probe = (PYTHON, "-c", PROBE, place.url, place.bucket, str(count))
        found: dict[str, float] = json.loads(docker("exec", self.service("manager"), *probe))
        return found


@dataclass
class Job:
    """Job with its measured durations on the backends `local` and `localstack`.

    Other figures are only for `localstack`.
    """

    name: str
    items: Sequence[float]
    """Sleep time of each task in seconds."""
    ideal_s: float
    """Duration of the job in seconds without overhead: the sleep time of all tasks divided by the slots."""
    wall_s: dict[str, list[float]] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    cpu_s: dict[str, float] = field(default_factory=dict)

    def used(self, part: str, seconds: float) -> None:
        """Add `seconds` to the CPU time of the part `part`."""
        self.cpu_s[part] = self.cpu_s.get(part, 0.0) + seconds

    def run(self, grid: LocalGrid) -> float:
        """Run the job on `grid`. Return the seconds from the submission to the end of the job."""
        folder = Path(tempfile.mkdtemp(dir=grid.home.path.parent))
        (folder / "work.py").write_text(WORK)
        (folder / "items.jsonl").write_text("".join(f"{one}\n" for one in self.items))
        (folder / "job.yaml").write_text(JOB)
        begun_s = time.monotonic()
        view = grid.wait(grid.submit(folder / "job.yaml", token=folder.name)["id"])
        assert view["state"] == "SUCCEEDED", view
        return time.monotonic() - begun_s

    def row(self, latency_ms: Mapping[str, float]) -> dict[str, Any]:
        """Return the table row of the job: medians of the durations, and means per run of the other figures."""
        local, remote = (statistics.median(self.wall_s[name]) for name in ("local", "localstack"))
        rounds = len(self.wall_s["localstack"])
        waited = sum(n * latency_ms.get(kind, 0.0) for kind, n in self.requests.items())
        return {
            "what": f"{len(self.items):,} {self.name}",
            "local_s": local,
            "localstack_s": remote,
            "ratio": remote / local,
            "ideal_s": self.ideal_s,
            "requests_per_task": self.requests.total() / rounds / len(self.items),
            "requests_s": waited / 1000 / rounds,
            "requests": {kind: n / rounds for kind, n in sorted(self.requests.items())},
            "cpu_s": {part: used / rounds for part, used in self.cpu_s.items()},
        }


@contextmanager
def counted(parts: Parts, job: Job) -> Iterator[None]:
    """Count the requests and the CPU time during the `with` block, and add both counts to the job."""
    requests, cpu = parts.requests(), parts.cpu_s()
    yield
    time.sleep(0.5)
    job.requests += parts.requests() - requests
    for part, used in parts.cpu_s().items():
        job.used(part, used - cpu[part])


@contextmanager
def up(backend: str, folder: Path) -> Iterator[LocalGrid]:
    """Start a grid with up to `SLOTS` instances of one slot each, and stop the grid at the end of the block."""
    grid = LocalGrid(folder, (Pool(POOL, 0, SLOTS, 1),), backend=backend)
    try:
        yield grid
    finally:
        grid.stop()


def serving(grid: LocalGrid) -> int:
    """Return the number of the grid's instances that are InService."""
    (pool,) = grid.client.grid()["pools"]
    return sum(one["state"] == LifecycleState.IN_SERVICE for one in pool["instances"])


def asked_in(parts: Parts, seconds: float) -> Counter[str]:
    """Count the requests of an idle grid for `seconds` seconds. Return the requests per minute, by kind of request."""
    before = parts.requests()
    time.sleep(seconds)
    asked = parts.requests() - before
    return Counter({kind: round(n * 60 / seconds) for kind, n in asked.items()})


def measure(folder: Path, *, small: bool) -> list[dict[str, Any]]:
    """Run all measurements, and return the rows of the table."""
    rounds, idle_s = (2, 20.0) if small else (3, 60.0)
    naps_s = [0.05] * (100 if small else 400)
    jobs = [
        Job("no-op tasks", [0.0] * (500 if small else 2_000), 0.0),
        Job("tasks of 50 ms", naps_s, sum(naps_s) / SLOTS),
    ]
    with up("local", folder / "local") as local, up("localstack", folder / "localstack") as remote:
        grids = {"local": local, "localstack": remote}
        manager = Home(folder / "local").record()
        assert manager
        parts = Parts(Home(folder / "localstack"))
        first = Job("task from no instance", [0.0], 0.0)
        from_zero_s = {name: first.run(grid) for name, grid in grids.items()}
        for grid in grids.values():
            grid.client.scale(POOL, min=SLOTS, desired=SLOTS)
            wait_for(lambda grid=grid: serving(grid) == SLOTS)  # type: ignore[misc]
            Job("to warm up", [0.0] * 200, 0.0).run(grid)
        latency_ms = parts.latency_ms(20 if small else 200)
        for job in jobs:
            for _ in range(rounds):
                begun_s = cpu_s(manager.pid)
                job.wall_s.setdefault("local", []).append(job.run(local))
                job.used("all of local", cpu_s(manager.pid) - begun_s)
                with counted(parts, job):
                    job.wall_s.setdefault("localstack", []).append(job.run(remote))
        time.sleep(idle_s if small else QUIET_S)
        both = asked_in(parts, idle_s)
        remote.client.scale(POOL, min=0, auto=True)
        wait_for(lambda: not parts.ids("batchlab.instance"))
        alone = asked_in(parts, idle_s)
    return [
        {"what": "a task from no instance", **{f"{k}_s": v for k, v in from_zero_s.items()}},
        *(job.row(latency_ms) for job in jobs),
        {"what": "a call from within the network", "median_ms": latency_ms},
        {
            "what": "a minute at rest",
            "manager_alone": alone.total(),
            "each_worker": (both.total() - alone.total()) / SLOTS,
            "with_workers": dict(both),
            "without": dict(alone),
        },
    ]


def main() -> None:
    """Run the measurements, and print the table of results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="less of everything, for a check")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="batchlab-overhead-") as folder:
        rows = measure(Path(folder), small=options.small)
    for row in rows:
        told = {k: v for k, v in row.items() if k != "what"}
        print(row["what"])
        for name, value in told.items():
            if isinstance(value, dict):
                value = "  ".join(f"{kind}: {n:,.3g}" for kind, n in value.items())
            print(f"  {name:<18} {value if isinstance(value, str) else f'{value:,.3g}'}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
