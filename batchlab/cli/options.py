"""Declarations and shell completion of options that several commands share.

Invariant: a completion takes at most COMPLETION_TIMEOUT_S seconds per request, does not print errors, and does not
create files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import typer

from batchlab.core.errors import BatchlabError, UsageError

if TYPE_CHECKING:
    from batchlab.runtime.home import Home

COMPLETION_TIMEOUT_S = 0.5
"""Timeout in seconds of a completion's request to the manager. A manager usually responds much faster."""
MAX_LISTED = 100
LAST = "last"


def backends(incomplete: str) -> list[str]:
    """Return the backends whose names begin with the incomplete text."""
    return _matching(incomplete, _scenario_names("backends", "*/backend.toml", lambda path: path.parent.name))


def examples(incomplete: str) -> list[str]:
    """Return the shipped examples whose names begin with the incomplete text.

    The example `starter` is left out, because `batchlab init` writes the files of `starter` by default.
    """
    names = _scenario_names("examples", "*/job.yaml", lambda path: path.parent.name)
    return _matching(incomplete, (name for name in names if name != "starter"))


def scenarios(incomplete: str) -> list[str]:
    """Return the installed scenarios whose names begin with the incomplete text.

    If no scenario matches, the shell offers files.
    """
    return _matching(incomplete, _scenario_names("scenarios", "*.yaml", lambda path: path.stem))


def jobs(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the ids of jobs that begin with the incomplete text. The id of the newest job comes first.

    The ids come from the manager or else from the local bucket.
    """
    home = _home(ctx)
    ids = [str(job["id"]) for job in _request_list(home, f"/v1/jobs?limit={MAX_LISTED}", "jobs")]
    return _matching(incomplete, [LAST, *(ids or _local_jobs(home))])


def schedules(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the schedules whose names begin with the incomplete text."""
    views = _request_list(_home(ctx), "/v1/schedules", "schedules")
    return _matching(incomplete, (str(schedule["name"]) for schedule in views))


def pools(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the pools of the running grid whose names begin with the incomplete text."""
    return _matching(incomplete, (str(pool["name"]) for pool in _request_list(_home(ctx), "/v1/grid", "pools")))


def queries(incomplete: str) -> list[str]:
    """Return the named queries of reports whose names begin with the incomplete text."""
    from batchlab.reports.queries.store import named_queries

    return _matching(incomplete, named_queries())


def tasks(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the failed tasks of the command's job that begin with the incomplete text, and the stages of the job.

    A stage is the beginning of a task's name, such as `parse/`.
    """
    from batchlab.core.job_definition import task_name

    home, job = _home(ctx), str(ctx.params.get("job") or LAST)
    newest = _request_list(home, "/v1/jobs?limit=1", "jobs") if job == LAST else []
    path = f"/v1/jobs/{quote(newest[0]['id'] if newest else job, safe='')}"
    failures = _request_list(home, f"{path}/failures?limit={MAX_LISTED}", "failures")
    stages = [f"{stage['name']}/" for stage in _request_list(home, path, "stages")]
    return _matching(incomplete, [*(task_name(one["stage"], one["task"]) for one in failures), *stages])


def job_states(incomplete: str) -> list[str]:
    """Return the values of the option --state that begin with the incomplete text."""
    from batchlab.cli.option_values import job_states

    return _matching(incomplete.lower(), job_states())


def _matching(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _scenario_names(folder: str, pattern: str, name: Callable[[Path], str]) -> list[str]:
    from batchlab.core import installation

    try:
        return sorted(name(path) for path in installation.folder(folder).glob(pattern))
    except UsageError:
        return []


def _home(ctx: typer.Context) -> Home:
    from batchlab.runtime.home import find_home

    named = ctx.params.get("home")
    return find_home(Path(named) if named else None)


def _request_list(home: Home, path: str, listed: str) -> list[dict[str, Any]]:
    """Request a list from the running manager. Return [] if the manager does not respond."""
    from batchlab.client.http import Client

    try:
        record = home.record()
        if record is None:
            return []
        with Client.of(home, record) as client:
            views: list[dict[str, Any]] = client.get(path, answer_s=COMPLETION_TIMEOUT_S)[listed]
    except BatchlabError:
        return []
    return views


def _local_jobs(home: Home) -> list[str]:
    """Return the ids of the jobs in the local bucket. The id of the newest job comes first."""
    try:
        jobs = [(path.stat().st_mtime, path.name) for path in (home.objects / "jobs").iterdir()]
    except OSError:
        return []
    return [name for _, name in sorted(jobs, reverse=True)[:MAX_LISTED]]


def option(text: str, metavar: str | None = None, *names: str, default: Any = None, **settings: Any) -> Any:
    """Declare an option with the help `text`.

    The option has the names in `names`, or by default the name of the command's parameter.
    """
    settings.setdefault("show_default", default not in (None, ""))
    return typer.Option(default, *names, metavar=metavar, help=text, **settings)


def argument(text: str, metavar: str, *, default: Any = ..., **settings: Any) -> Any:
    """Declare an argument with the help `text`. The argument is required unless `default` is given."""
    settings.setdefault("show_default", default not in (..., None, ""))
    return typer.Argument(default, metavar=metavar, help=text, **settings)


def flag(text: str, *names: str, hidden: bool = False) -> Any:
    """Declare a boolean option with the help `text` and the default False."""
    return typer.Option(False, *names, help=text, hidden=hidden)


HOME = option("Folder of the grid. Default: $BATCHLAB_HOME, or else .batchlab in the current folder.", "DIR")
BACKEND = option("Name of the grid's backend.", "NAME", default="local", autocompletion=backends)
ENDPOINT = option(
    "URL of S3 and SQS, optionally with a bucket as its path, or the address of a bucket, such as gs://BUCKET. "
    "Default: $BATCHLAB_ENDPOINT, or else the grid's own emulator.",
    "URL",
)
SCENARIO = argument("Path of a scenario file, or name of a shipped scenario.", "SCENARIO", autocompletion=scenarios)
LIKE = option("Backend whose settings the simulated grid uses.", "BACKEND", default="aws", autocompletion=backends)
CALIBRATION = option("File with the measurements of a grid, which `scenario calibrate` wrote.", "FILE")
NO_SHARES = flag("Ignore the fair-share policy of the scenario, for a comparison.", "--no-shares")
JSON = flag("Print the output as JSON, for programs.", "--json")
OUT = option("Folder for the job's results. Default: out/<job name> in the current folder.", "DIR")
SET = option("Set a parameter of the job. Repeatable.", "KEY=VALUE", "--set")
POOL = option(
    "Pool of workers, such as default:0-4x1, default:0-1x8,gpus=1 for instances with a GPU, or "
    "tools:0-4x1,image=registry/tools:1 for workers in a container image. The named pools replace the backend's "
    "default pools. Repeatable.",
    "NAME:MIN-MAXxSLOTS[,gpus=N][,image=IMAGE]",
)
AS_IF = flag("Show the cost that the work would have on AWS, also on a backend that costs nothing.", "--as-if-aws")
SHARE = option(
    "Share identifier of the job in the grid's fair-share policy. Default: the share of the job file.",
    "SHARE",
    "--share",
)
MAX_COST = option(
    "Cap on the cost on AWS, such as 5USD. At the cap, batchlab does not launch more instances.", "AMOUNT"
)
AFTER = option(
    "Job that must succeed before this job begins, or with :ended must only end. Repeatable, up to 20 times.",
    "JOB[:succeeded|ended]",
    autocompletion=jobs,
)
LOG_FORMAT = option("Format of the logs. Default: $BATCHLAB_LOG_FORMAT, or else text.", "text|json")

CAP = argument("New cap on the cost, such as 5USD, or 'none' to remove the cap.", "AMOUNT")
JOB = argument("Id of a job, the beginning of an id, or 'last' for the newest job.", "JOB", autocompletion=jobs)
STATE = option(
    "State of the listed jobs, such as failed or running. 'active' means all jobs that have not ended, and 'ended' all "
    "other jobs. Repeatable. Default: all jobs.",
    "STATE",
    autocompletion=job_states,
)
_TASK_TEXT = "Name of a task, such as parse/3. In a job with one stage, the number 3 is enough."
TASK = argument(_TASK_TEXT, "TASK", autocompletion=tasks)
SHOWN_TASK = argument(f"{_TASK_TEXT} Default: show the whole job.", "TASK", default=None, autocompletion=tasks)
ANY_BACKEND = option(
    "Backend whose bucket contains the job. Default: the running grid's backend, or else local.",
    "NAME",
    autocompletion=backends,
)
BUCKET_BACKEND = option(
    "Backend whose bucket contains the job. Default: the running grid's backend, or else local.",
    "NAME",
    default="",
    autocompletion=backends,
)
RESUME = flag("Resume an interrupted run of the job, if one exists.", "--resume")
FILE = argument("Path of the job file.", "FILE")
