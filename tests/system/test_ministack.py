"""The `ministack` backend: the example jobs on S3 and SQS, and an emulator that is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from functools import partial
from pathlib import Path

import pytest

from batchlab import Grid
from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.aws.objects import open_s3
from batchlab.adapters.local.ministack import Emulator
from batchlab.core.errors import AlreadyExists, BackendError, UsageError
from batchlab.runtime.home import Home
from examples.example_data import ClaimsFacts
from tests.support.aws.emulators import ministack_python
from tests.support.grid.fixtures import Bring
from tests.support.grid.local_grid import processes_of
from tests.support.waiting import until
from tests.system.test_command_line import Cli, cli, numbers
from tests.system.test_examples_end_to_end import (
    TWO,
    grid,
    test_claims_on_the_real_files,
    test_media_keeps_every_frame,
    test_sort_of_one_large_file,
    test_transform_keeps_every_ride,
)
from tests.system.test_rough_treatment import check, claims, contents, under_way

# The jobs and the checks are those of `local`. The fixtures `backend` and `bring_up` below select the backend.
__all__ = [
    "claims",
    "cli",
    "grid",
    "test_claims_on_the_real_files",
    "test_media_keeps_every_frame",
    "test_sort_of_one_large_file",
    "test_transform_keeps_every_ride",
]


@pytest.fixture
def sort_bytes() -> int:
    """Return a small size, because the limit on memory is tested on `local`."""
    return 24 * 1024 * 1024


MINISTACK = ("--backend", "ministack")


@pytest.fixture(autouse=True)
def python() -> Path:
    return ministack_python()


@pytest.fixture(scope="module")
def backend() -> str:
    ministack_python()
    return "ministack"


@pytest.fixture
def bring_up(bring_up: Bring) -> Bring:
    return partial(bring_up, backend="ministack")


# --- A killed emulator ---------------------------------------------------------------------------


def test_an_emulator_killed_in_the_middle_costs_nothing(
    bring_up: Bring, claims: tuple[Path, ClaimsFacts], tmp_path: Path
) -> None:
    """The emulator forgets its queues with all messages, but the committed outcomes are in the bucket."""
    path, facts = claims
    grid = bring_up(TWO)
    job = grid.submit(path)["id"]
    grid.wait(job, until=under_way)
    place, killed = grid.home.place("ministack"), grid.emulator()
    os.kill(killed, signal.SIGKILL)
    check(grid, grid.wait(job, within_s=120), tmp_path / "out", facts)
    assert grid.emulator() != killed
    assert grid.home.place("ministack") == place, "whoever uses it must find the next one there"


def test_a_killed_emulator_has_every_object_that_it_acknowledged(python: Path, tmp_path: Path) -> None:
    """A commit is only as durable as the bucket."""
    acknowledged: dict[str, bytes] = {}
    stop = threading.Event()

    async def put(emulator: Emulator) -> None:
        objects = open_s3(emulator.endpoint, "kept")
        number = 0
        while not stop.is_set():
            number += 1
            key, data = f"some/{number % 7}/{number}", os.urandom(100 + number % 5000)
            try:
                await objects.put(key, data, if_absent=True)
            except (AlreadyExists, BackendError):
                continue  # the answer to this object was lost in the kill, so the object may exist or not
            acknowledged[key] = data

    def enough(count: int) -> bool:
        return len(acknowledged) >= count

    async def verify(emulator: Emulator) -> None:
        objects = open_s3(emulator.endpoint, "kept")
        for key, data in acknowledged.items():
            assert await objects.get(key) == data, key

    with Emulator(python, tmp_path) as emulator:
        putting = threading.Thread(target=lambda: asyncio.run(put(emulator)))
        putting.start()
        try:
            for kills in range(1, 4):
                until(partial(enough, 100 * kills), 30.0)
                emulator.kill()
                emulator.start()
        finally:
            stop.set()
            putting.join()
        asyncio.run(verify(emulator))
    with Emulator(python, tmp_path) as emulator:
        asyncio.run(verify(emulator))


def test_an_object_that_cannot_be_written_is_not_acknowledged(python: Path, tmp_path: Path) -> None:
    """Unpatched MiniStack answers 200, and loses the object at its end."""

    async def put(emulator: Emulator, content: bytes) -> None:
        await open_s3(emulator.endpoint, "kept").put("folder/a", content)

    async def get(emulator: Emulator) -> bytes:
        return await open_s3(emulator.endpoint, "kept").get("folder/a")

    async def put_while_it_cannot(emulator: Emulator, in_the_way: Path) -> None:
        putting = asyncio.create_task(put(emulator, b"second"))
        await asyncio.to_thread(until, lambda: not emulator.is_running(), 30.0)
        assert "exits without an answer" in emulator.log.read_text()
        assert not putting.done()
        in_the_way.rmdir()
        await asyncio.to_thread(emulator.start)
        await putting

    with Emulator(python, tmp_path) as emulator:
        asyncio.run(put(emulator, b"first"))
        # A folder at the path of the next version makes the write fail for every user, like a full disk.
        (written,) = (tmp_path / "s3").glob("*/kept/folder/a")
        in_the_way = written.with_name("a.tmp")
        in_the_way.mkdir()
        asyncio.run(put_while_it_cannot(emulator, in_the_way))
        assert asyncio.run(get(emulator)) == b"second"


def test_a_manager_killed_in_the_middle_leaves_its_emulator_to_the_next(
    bring_up: Bring, claims: tuple[Path, ClaimsFacts], tmp_path: Path
) -> None:
    path, facts = claims
    grid = bring_up(TWO)
    job = grid.submit(path)["id"]
    grid.wait(job, until=under_way)
    before = grid.emulator()
    grid.kill_manager()
    assert grid.emulator() == before
    check(grid, grid.wait(job), tmp_path / "out", facts)


def test_a_grid_taken_down_finds_all_again_and_rebuilds_its_ledger_from_it(
    bring_up: Bring, claims: tuple[Path, ClaimsFacts], tmp_path: Path
) -> None:
    """The second half of the test checks invariant I3 with a bucket on S3."""
    path, facts = claims
    grid = bring_up(TWO)
    job = grid.submit(path)["id"]
    grid.wait(job, until=under_way)
    place = grid.home.place("ministack")
    grid.stop()
    assert not processes_of(grid.home.path)
    grid.start()
    assert grid.home.place("ministack") == place
    check(grid, grid.wait(job), tmp_path / "out", facts)
    grid.stop()
    ledger = grid.home.backend_folder("ministack") / "ledger.sqlite"
    before = contents(ledger)
    for one in ledger.parent.glob(f"{ledger.name}*"):
        one.unlink()
    grid.start()
    assert grid.client.jobs() == []
    assert grid.client.rebuild() == 1
    grid.stop()
    assert contents(ledger) == before


def test_an_emulator_without_an_owner_ends_by_itself(python: Path, tmp_path: Path) -> None:
    """The owner of an emulator may be killed at any moment."""
    emulator = Emulator(python, tmp_path, orphan_s=1.0)
    emulator.start()
    pid = emulator.pid
    try:
        assert emulator._owner_lock is not None
        emulator._owner_lock.close()  # the kernel does this for an owner that dies
        until(lambda: not emulator.is_running(), 30.0)
    finally:
        emulator.stop()
    assert not Path(f"/proc/{pid}").exists()


# --- The command line ----------------------------------------------------------------------------


def test_run_from_nothing_leaves_nothing_running(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own AWS configuration neither breaks the run nor is used by it."""
    monkeypatch.setenv("AWS_PROFILE", "there-is-no-such-profile")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    cli.inputs(12)
    code, _, err = cli("run", "job.yaml", *MINISTACK, "--out", "out")
    assert code == 0, err
    assert numbers(cli.folder / "out") == list(range(12))
    cli.none_left()
    # In the same folder and with the same job, the backend `local` has its own data.
    code, _, err = cli("run", "job.yaml", "--out", "mine")
    assert code == 0, err
    assert numbers(cli.folder / "mine") == list(range(12))
    cli.none_left()


def test_interrupted_run_resumes_on_ministack(cli: Cli) -> None:
    cli.inputs(20)
    arguments = ("run", "job.yaml", *MINISTACK, "--out", "out", "--set", "seconds=0.1")
    first = cli.start(*arguments)
    bucket = cli.home.backend_folder("ministack") / "s3"
    cli.wait(lambda: len(list(bucket.glob("*/*/jobs/*/work/outcomes/*/*.json"))) >= 3, "outcome")
    first.send_signal(signal.SIGINT)
    assert cli.end(first)[0] == 130
    cli.none_left()
    code, _, err = cli(*arguments, "--resume")
    assert code == 0, err
    assert numbers(cli.folder / "out") == list(range(20))


def test_a_grid_at_a_named_endpoint_starts_no_emulator(cli: Cli, ministack: Endpoint) -> None:
    assert ministack.url is not None
    cli.inputs(3)
    code, out, err = cli("grid", "up", *MINISTACK, "--endpoint", ministack.url)
    assert code == 0, err
    place = cli.home.place("ministack")
    assert place is not None
    assert f"bucket {place.bucket} at {ministack.url}" in out
    assert not [w for w in processes_of(cli.home.path).values() if "ministack_guard" in str(w)]
    assert cli("run", "job.yaml", *MINISTACK)[0] == 0
    assert cli("grid", "rebuild-ledger")[1] == "The ledger is rebuilt: 1 job.\n"
    assert cli("grid", "down")[0] == 0
    # The home stores the bucket, and refuses another one.
    assert cli("run", "job.yaml", *MINISTACK, "--cache")[0] == 0
    code, _, err = cli("run", "job.yaml", *MINISTACK, "--endpoint", "http://127.0.0.1:1/another")
    assert code == 2
    assert f"has its bucket at {ministack.url}/{place.bucket}" in err
    # After the loss of a home, the name of the bucket is enough to restore the jobs.
    at = f"{ministack.url}/{place.bucket}"
    code, _, err = cli("grid", "up", *MINISTACK, "--home", "other", "--endpoint", at)
    assert code == 0, err
    try:
        assert cli("grid", "rebuild-ledger", "--home", "other")[1].endswith(": 1 job.\n")
    finally:
        assert cli("grid", "down", "--home", "other")[0] == 0


def test_doctor_tries_the_emulator_for_real(cli: Cli) -> None:
    code, out, err = cli("doctor", *MINISTACK)
    assert code == 0, out + err
    assert "conditional creates and queues work" in out
    cli.none_left()


# --- Python --------------------------------------------------------------------------------------


def test_a_grid_of_the_python_api(tmp_path: Path) -> None:
    with Grid("ministack", home=tmp_path, workers=1) as grid:
        assert list(grid.map(lambda x: x * x, range(5))) == [0, 1, 4, 9, 16]
        with pytest.raises(UsageError, match="runs on backend ministack"):
            Grid("local", home=tmp_path)
    until(lambda: not processes_of(tmp_path), 30.0)
    assert Home(tmp_path).place("ministack") is not None
