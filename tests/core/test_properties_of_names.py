"""Names and keys, which are equal for the same thing, different for different things, and never leave their folder."""

from __future__ import annotations

import re
import string
from itertools import product
from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.adapters.limits import check_key, check_prefix, check_queue_name
from batchlab.core.errors import UsageError
from batchlab.core.model import Bundle, JobId, StageName, TaskSet
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.object_keys import CommitKey
from batchlab.core.task_context import FreeNames, name_problem
from batchlab.jobs import handler_lookup
from batchlab.jobs.field_types import NAME_PATTERN
from batchlab.jobs.results import Names
from batchlab.worker import code_cache
from tests.support.properties import PROPERTY, SLOW

NAME = st.from_regex(NAME_PATTERN.replace("$", r"\Z"), alphabet=string.printable).filter(
    lambda name: len(name) <= 40
) | st.sampled_from(
    # The layout of the bucket uses these names.
    ["plan", "cuts", "outcomes", "files", "logs", "starts", "running", "retries", "final", "spec"]
)
KEY = CommitKey("0f" * 16)
COUNT = st.integers(0, 10**9)
TASKS = st.sets(st.integers(0, 10**9), min_size=1, max_size=5).map(TaskSet.from_indices)


def bundles(job: JobId, stage: StageName) -> st.SearchStrategy[Bundle]:
    return st.builds(Bundle, st.just(job), st.just(stage), TASKS, st.integers(1, 99), st.integers(0, 99))


def keys_of(job: JobId, stage: StageName, number: int, bundle: Bundle) -> list[str]:
    """Return one key of every kind."""
    return [
        object_keys.spec(job),
        object_keys.control(job),
        object_keys.retry(job, number),
        object_keys.final(job, number),
        object_keys.manifest(job, stage, number),
        object_keys.part(job, stage, number, object_keys.old_part(number)),
        object_keys.item(job, stage, number, f"{number:032x}"),
        object_keys.cut(job, stage, number, number),
        object_keys.outcome(bundle, KEY),
        object_keys.files(bundle, "w-1", KEY),
        object_keys.log(bundle, "w-1", KEY),
        object_keys.starts(bundle),
        object_keys.running(bundle, KEY),
    ]


@SLOW
@given(st.lists(st.tuples(NAME, NAME, COUNT), min_size=1, max_size=4, unique=True), st.data())
def test_keys_are_distinct_and_stay_below_their_job(things: list[tuple[str, str, int]], data: st.DataObject) -> None:
    seen: dict[str, tuple[int, str, str, str]] = {}
    for name, stage, number in things:
        job = object_keys.job_id(name, "token")
        bundle = data.draw(bundles(job, StageName(stage)))
        first = keys_of(job, StageName(stage), number, bundle)
        assert first == keys_of(job, StageName(stage), number, bundle)
        for kind, key in enumerate(first):
            (check_prefix if key.endswith("/") else check_key)(key)
            root = next(one for one in object_keys.everything_of(job) if key.startswith(one))
            assert kind < 4 or key.startswith(f"{root}{stage}/")
            which = bundle.id if kind >= 8 else str(number) if kind >= 2 else ""
            what = (kind, name, stage if kind >= 4 else "", which)
            assert seen.setdefault(key, what) == what, f"{key} is of two things"
        # Without its slash, the prefix of one bundle would match the keys of another one.
        for prefix in (object_keys.raw(job), object_keys.files(bundle, "w-1", KEY), object_keys.starts(bundle)):
            assert prefix.endswith("/")
    folded = {key.casefold() for key in seen}
    assert len(folded) == len(seen), "a bucket in a folder may be on a file system that ignores case"
    prefixes = [key for key in seen if key.endswith("/")]
    for prefix, key in product(prefixes, seen):
        # A listing of a prefix must not return keys of another kind.
        assert prefix == key or not key.startswith(prefix), (prefix, key)


@PROPERTY
@given(NAME, NAME, st.text(), st.text())
def test_a_job_is_its_name_and_token(name: str, other: str, token: str, another: str) -> None:
    job = object_keys.job_id(name, token)
    assert job == object_keys.job_id(name, token)
    assert (job == object_keys.job_id(other, another)) == ((name, token) == (other, another))
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]*-[0-9a-f]{10}", job)
    assert job.rpartition("-")[0] == name


@PROPERTY
@given(NAME, NAME, st.from_regex(r"[a-z0-9][a-z0-9-]{1,26}[a-z0-9]", fullmatch=True))
def test_queues_are_distinct_and_fit_their_service(pool: str, other: str, bucket: str) -> None:
    names = [object_keys.EVENTS, object_keys.tasks_queue(pool), object_keys.dead_letters(pool)]
    assert len(set(names)) == 3
    for name in names:
        check_queue_name(f"{bucket}-{name}")
    if pool != other:
        assert object_keys.tasks_queue(other) not in names[:2]


@PROPERTY
@given(TASKS, st.integers(1, 99), st.integers(0, 99))
def test_bundle_id_encodes_its_content(tasks: TaskSet, attempt: int, round: int) -> None:
    bundle = Bundle(JobId("j"), StageName("s"), tasks, attempt, round)
    first, last, again, tries = re.split(r"[-.]", bundle.id)
    assert (int(first), int(last), int(again), int(tries)) == (tasks.first, tasks.last, round, attempt)


@PROPERTY
@given(st.binary(min_size=32, max_size=32), st.text(max_size=3))
def test_a_code_key_gives_back_its_digest_and_nothing_else_does(data: bytes, odd: str) -> None:
    assert code_cache.digest_of(f"code/{data.hex()}.zip") == data.hex()
    for key in (f"code/{odd}.zip", f"code/{odd}{data.hex()}.zip", f"{odd}", f"code/../{odd}"):
        if key != f"code/{data.hex()}.zip":
            with pytest.raises(UsageError):
                code_cache.digest_of(key)


# --- Names from users and results ----------------------------------------------------------------

ODD = st.text(st.sampled_from("a.#/\\ \n\0é☃\ud83d0-~*"), max_size=12) | st.text(max_size=40)


@PROPERTY
@given(ODD)
def test_safe_name_stays_in_its_folder(name: str) -> None:
    if name_problem(name) is None:
        check_key(f"files/j/s/{name}")
        assert handler_lookup.absolute(Path("/folder") / name).is_relative_to("/folder")


@PROPERTY
@given(st.lists(st.tuples(ODD, st.integers(0, 3)), max_size=8))
def test_fetched_files_neither_leave_their_folder_nor_hide_each_other(named: list[tuple[str, int]]) -> None:
    names = Names("files/s/0")
    found: dict[str, tuple[str, int]] = {}
    for name, number in named:
        path, is_new = names.path_of({"$file": f"k{number}", "name": name, "size": 1})
        assert is_new == (path not in found)
        assert found.setdefault(path, (name, number)) == (name, number)
        assert path.startswith("files/s/0/")
        check_key(path)
    folded = [path.casefold() for path in found]
    assert len(set(folded)) == len(folded)
    assert not any(one.startswith(f"{other}/") for one in folded for other in folded)


@PROPERTY
@given(st.lists(st.text(st.sampled_from("aAbB/ßéE\u0301"), min_size=1, max_size=5), max_size=8))
def test_free_names_are_different_on_a_file_system_that_ignores_case(names: list[str]) -> None:
    free = FreeNames()
    taken = [free.take(name) for name in names]
    assert all(one.endswith(name) for one, name in zip(taken, names, strict=True))
    folded = [normalize("NFD", normalize("NFD", name).casefold()) for name in taken]
    assert len(set(folded)) == len(folded)
    assert not any(one.startswith(f"{other}/") for one in folded for other in folded)


@PROPERTY
@given(ODD.filter(lambda name: "/" not in name and name not in ("", ".", "..")))
def test_an_input_is_refused_at_the_door_or_has_a_key(name: str) -> None:
    """A name that passes the check of a job file can be stored."""
    if handler_lookup.unfit(name) is None:
        check_key(f"{object_keys.raw(JobId('j'))}0000000/{name}")
