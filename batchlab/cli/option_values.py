"""Parsers of option values, such as folders, durations, amounts, and pools, and access to the running manager and its
jobs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab.cli import output
from batchlab.core.errors import NotFound, Unreachable, UsageError
from batchlab.core.text import DURATION_FORMS, seconds, show_value
from batchlab.core.users import OWNER

if TYPE_CHECKING:
    from typer import BadParameter

    from batchlab.client.http import Client
    from batchlab.core.api_types import JobView
    from batchlab.core.model import JobState, Pool
    from batchlab.runtime.home import Home


def home_of(option: Path | None) -> Home:
    """Return the grid's folder for the value of --home, or the default folder."""
    from batchlab.runtime.home import find_home

    return find_home(option)


def seconds_of(option: str, text: str, *, least_s: float = 0.0) -> float:
    """Return the seconds of a duration such as `10m`, or of a number of seconds.

    Raise UsageError for an invalid duration, or a duration below `least_s`.
    """
    try:
        duration_s = seconds(float(text) if text.replace(".", "", 1).isdigit() else text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}.", remedy=f"Write {DURATION_FORMS}.") from error
    if duration_s < least_s:
        raise UsageError(f"{option}: {show_value(text)} is too short.", remedy=f"Write {least_s:g}s or more.")
    return duration_s


def assignments(texts: Iterable[str], example: str, form: str = "KEY=VALUE") -> dict[str, str]:
    """Return the values by key from texts such as KEY=VALUE. Raise UsageError for a text in another form."""
    values: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{text!r} is not {form}.", remedy=f"Write for example {example}.")
        values[key] = value
    return values


def parameters_of(texts: Iterable[str] | None) -> dict[str, str]:
    """Return the values of the option --set by job parameter. Raise UsageError for a text in another form than
    KEY=VALUE.
    """
    return assignments(texts or (), "--set year=2026")


def resume_command(arguments: Iterable[str]) -> str:
    """Return the command line that resumes a run of a job. `arguments` are the arguments of the command that started
    the run.
    """
    import shlex

    same = [argument for argument in arguments if argument not in ("--resume", "--debug")]
    return shlex.join(["batchlab", *same, "--resume"])


def share_of(text: str | None) -> str:
    """Return the share identifier in the value of --share, or "" without the option. Raise UsageError for other
    texts."""
    if text is None:
        return ""
    from batchlab.core.fair_share import check_identifier

    return check_identifier(text)


def cap_of(text: str) -> float | None:
    """Return a cost cap in USD from a text such as `5USD`, or None for `none`. Raise UsageError for other texts."""
    from batchlab.core.pricing.price_book import parse

    return None if text == "none" else parse(text)


def cap_text(usd: float | None) -> str:
    """Return a cost cap as part of a sentence, such as "capped at 5.00 USD"."""
    from batchlab.core.pricing.price_book import shown

    return "not capped" if usd is None else f"capped at {shown(usd)}"


def job_states() -> Mapping[str, frozenset[JobState]]:
    """Return the states that each value of the option --state means."""
    from batchlab.core.model import ENDED, JobState

    groups = {"active": frozenset(JobState) - ENDED, "ended": ENDED}
    return {**{state.lower(): frozenset({state}) for state in JobState}, **groups}


def states_of(names: Iterable[str]) -> frozenset[JobState]:
    """Return the states that the values of the option --state mean. Raise UsageError for an unknown state."""
    import difflib

    known = job_states()
    states: frozenset[JobState] = frozenset()
    for name in names:
        if name.lower() not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1)
            remedy = f"Did you mean {near[0]}?" if near else f"Write one of {', '.join(known)}."
            raise UsageError(f"The state {name!r} does not exist.", remedy=remedy)
        states |= known[name.lower()]
    return states


# --- The running manager -------------------------------------------------------------------------

JOBS_PER_REQUEST = 500
_JOB_ID = re.compile(r"[A-Za-z0-9_-]+-[0-9a-f]{10}")


@contextmanager
def connect(home: Path | Home | None) -> Iterator[Client]:
    """Yield a client of the grid's running manager.

    Without a running manager, yield a client that reads the jobs in the grid's folder, or raise Unreachable if the
    folder does not have a ledger. A NotFound error in the `with` block becomes a UsageError.
    """
    place = home_of(home) if home is None or isinstance(home, Path) else home
    with client_of(place) as client, names_by_user():
        yield client


@contextmanager
def names_by_user() -> Iterator[None]:
    """Convert a NotFound error in the `with` block to a UsageError, because the user gave a wrong name."""
    try:
        yield
    except NotFound as error:
        raise UsageError(error.message, remedy=error.remedy) from error


def client_of(home: Home) -> Client:
    """Return a client of the running manager, or else a client that reads the grid's folder.

    Raise Unreachable if no manager is running and the folder does not have a ledger.
    """
    from batchlab.client.http import Client

    if record := home.record():
        if _has_unused_token():
            output.say(f"Note: BATCHLAB_TOKEN has no effect without BATCHLAB_URL. The token in {home.path} is used.")
        return Client.of(home, record)
    from batchlab.cli.folder_client import open_folder

    if client := open_folder(home):
        return client
    raise no_grid(home)


def _has_unused_token() -> bool:
    """Return whether the environment has a user's token, but not the address of the manager."""
    from batchlab.runtime.home import TOKEN_VARIABLE, URL_VARIABLE

    return bool(os.environ.get(TOKEN_VARIABLE)) and not os.environ.get(URL_VARIABLE)


def no_grid(home: Home) -> Unreachable:
    """Return the error for a command that needs a running grid."""
    from batchlab.runtime import aws_deployment

    # In a folder with a deployment on AWS, `grid up` without --backend would start another grid on this machine.
    deployed = aws_deployment.path_in(home).exists()
    knows = ", which knows the jobs that ran here" if home.objects.is_dir() else ""
    remedy = (
        "Connect to its stack on AWS with `batchlab grid up --backend aws`; without --backend a "
        "grid starts on this machine."
        if deployed
        else f"Start one with `batchlab grid up`{knows}, or name another folder with --home."
    )
    if _has_unused_token():
        remedy = f"BATCHLAB_TOKEN needs the manager's address in BATCHLAB_URL. {remedy}"
    return Unreachable(f"No grid is up in {home.path}.", remedy=remedy)


def resolve(client: Client, text: str) -> JobView:
    """Return the job whose id is `text`, or the only job whose id begins with `text`.

    For the text "last", return the newest job.
    """
    if text == "last":
        for newest in client.jobs(limit=1):
            return newest
        raise UsageError("The grid does not have jobs yet.", remedy="`batchlab job submit FILE` submits one.")
    if _JOB_ID.fullmatch(text):
        with suppress(NotFound):
            return client.job(text)
    matches: list[JobView] = []
    page = client.jobs(limit=JOBS_PER_REQUEST)
    while page:
        matches += [job for job in page if job["id"].startswith(text)]
        page = client.jobs(limit=JOBS_PER_REQUEST, before=page[-1]["id"])
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise UsageError(f"The job {text!r} does not exist.", remedy="`batchlab job list` lists the jobs.")
    ids = ", ".join(job["id"] for job in matches[:3])
    raise UsageError(
        f"{text!r} could be any of {len(matches)} jobs: {ids}{', …' if len(matches) > 3 else ''}.",
        remedy="Write more of the id.",
    )


def jobs_in(
    client: Client, states: frozenset[JobState], limit: int, owner: str | None = None, share: str | None = None
) -> list[JobView]:
    """Return the newest jobs in one of the states, at most `limit`. Without states, return the newest jobs. With
    `owner`, return only jobs of this user. With `share`, return only jobs of this share.
    """
    from batchlab.core.fair_share import DEFAULT_SHARE
    from batchlab.core.model import ENDED, JobState

    if owner is None and share is None and (not states or states == frozenset(JobState) - ENDED):
        return client.jobs(limit=limit, active=bool(states))
    jobs: list[JobView] = []
    last: str | None = None
    while len(jobs) < limit:
        page = client.jobs(limit=JOBS_PER_REQUEST, before=last, active=bool(states) and not states & ENDED)
        jobs += [
            job
            for job in page
            if (not states or job["state"] in states)
            and owner in (None, job.get("owner", OWNER))
            and share in (None, job.get("share") or DEFAULT_SHARE)
        ]
        if len(page) < JOBS_PER_REQUEST:
            break
        last = page[-1]["id"]
    return jobs[:limit]


def is_whole_id(text: str) -> bool:
    """Return whether `text` has the form of a job's complete id."""
    return _JOB_ID.fullmatch(text) is not None


def call_with_job(client: Client, text: str, verb: Callable[[Client, str], JobView]) -> JobView:
    """Call `verb` with the id of the job that `text` names.

    The function first uses `text` as a complete id, because the bucket may contain a job that the manager does not
    list.
    """
    if _JOB_ID.fullmatch(text):
        with suppress(NotFound):
            return verb(client, text)
    return verb(client, resolve(client, text)["id"])


# --- Numbers and pools ---------------------------------------------------------------------------

_KINDS = {
    "greater_than_equal": "a number",
    "less_than_equal": "a number",
    "float_parsing": "a number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
}
"""Kind of number that an option expects, by error type of Typer's parser."""


def value_error(error: BadParameter) -> UsageError | None:
    """Return a UsageError for an invalid number or choice, or None for other errors of Typer's parser."""
    # The variables have the type Any, because the classes of these objects are internal to Typer.
    option: Any = error.param
    mistakes: Any = getattr(error.__cause__, "errors", None)
    if option is None or mistakes is None:
        return None
    first = mistakes()[0]
    kind = _KINDS.get(first["type"])
    name = next((opt for opt in option.opts if opt.startswith("-")), "")
    if first["type"] == "value_error":  # the value is not one of the option's choices
        command = error.ctx.command_path if error.ctx else "batchlab"
        return UsageError(
            f"{name or option.metavar}: {first['ctx']['error']}", remedy=f"`{command} --help` describes the choices."
        )
    if kind is None:
        return None
    range_ = _range(option.min, option.max)
    return UsageError(
        f"{name or option.metavar} is {kind}{range_}, not {str(first['input'])[:40]}.",
        remedy=f"Write for example {name}{' ' if name else ''}{_example(option):g}.",
    )


def _range(least: float | None, most: float | None) -> str:
    if most is None:
        return "" if least is None else f" from {least:g} on"
    return f" up to {most:g}" if least is None else f" from {least:g} to {most:g}"


def _example(option: Any) -> float:
    usual, least = option.default, option.min
    return float(usual if isinstance(usual, int | float) else max(1, least or 0))


_POOL_FORM = re.compile(r"([a-z0-9][a-z0-9_-]{0,39}):(\d{1,5})-(\d{1,5})x(\d{1,4})")


def _gpus_of(text: str, where: str) -> int:
    from batchlab.core.job_definition import MAX_GPUS

    if not text.isdecimal() or int(text) > MAX_GPUS:
        raise UsageError(
            f"{where} has gpus={text[:40]}, which is not a number from 0 to {MAX_GPUS}.",
            remedy="Write for example default:0-4x8,gpus=2.",
        )
    return int(text)


def _image_of(text: str, where: str) -> str:
    from batchlab.core.container_images import check_image

    return check_image(text, where)


_POOL_OPTIONS: Mapping[str, Callable[[str, str], Any]] = {"gpus": _gpus_of, "image": _image_of}
"""Options after a pool's numbers, which are fields of Pool, with the function that reads the value."""


def _split_pool_options(text: str) -> tuple[str, dict[str, Any]]:
    """Return a pool's text without its options, and the options by field of Pool. The pool `a:0-4x8,gpus=2` has the
    option `gpus`. Raise UsageError for an unknown or invalid option.
    """
    form: list[str] = []
    options: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            form.append(part)
        elif name not in _POOL_OPTIONS or name in options:
            raise UsageError(
                f"The pool {text!r} has the option {name!r}, which is unknown or given twice.",
                remedy=f"The options of a pool are {', '.join(f'{known}=VALUE' for known in _POOL_OPTIONS)}.",
            )
        else:
            options[name] = _POOL_OPTIONS[name](value, f"The pool {text!r}")
    return ",".join(form), options


def parse_pool(text: str) -> Pool:
    """Return the pool for a text such as `default:0-4x1`, `default:0-4x8,gpus=2`, or
    `tools:0-4x1,image=registry/tools:1`. Raise UsageError for an invalid text.
    """
    return _pool(text, *_split_pool_options(text))


def _pool(text: str, form: str, options: Mapping[str, Any]) -> Pool:
    """Return the pool for the option `text`. The option consists of the sizes `form` and of `options`."""
    from batchlab.core.model import Pool

    match = _POOL_FORM.fullmatch(form)
    if match is None:
        raise UsageError(
            f"The pool {text!r} is not NAME:MIN-MAXxSLOTS, with ,gpus=N or ,image=IMAGE if needed.",
            remedy="Write for example default:0-4x1: no to four instances with one slot each. A "
            "name has up to 40 small letters, digits, '-' and '_'.",
        )
    smallest, largest, slots = (int(number) for number in match.groups()[1:])
    pool = Pool(match[1], smallest, largest, slots, **options)
    if pool.min_size > pool.max_size or pool.slots < 1:
        raise UsageError(
            f"The pool {text!r} needs MIN ≤ MAX and at least one slot.", remedy="Write for example default:0-4x1."
        )
    return pool


def parse_typed_pool(text: str) -> tuple[Pool, tuple[str, ...]]:
    """Return the pool and the instance types for a text such as `default:0-4x1@m7i.large`.

    Raise UsageError for an invalid text.
    """
    form, options = _split_pool_options(text)
    sizes, at, types = form.partition("@")
    names = tuple(one.strip() for one in types.split(","))
    if at and not all(names):
        raise UsageError(
            f"The pool {text!r} lacks an instance type after '@'.",
            remedy="Write for example default:0-4x1@m7i.large,m6i.large.",
        )
    return _pool(text, sizes, options), names if at else ()


def parse_pools(texts: Iterable[str]) -> list[Pool]:
    """Return the pools for texts such as `default:0-4x1`. Raise UsageError for an invalid text or a repeated name."""
    pools = [parse_pool(text) for text in texts]
    names = [pool.name for pool in pools]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"The pool {name!r} is given twice.", remedy="Give each pool one --pool.")
    return pools
