"""Commands of `batchlab grid`, for the grid in a folder, its pools, its workers, and its web page.

Invariant: a URL never contains the grid's token. The URL of the web page contains a one-time code in its fragment,
which browsers do not send to servers. A browser gets the URL through a file that only the user can read, because other
users can read the command line of a browser.

An option describes a pool in the form NAME:MIN-MAXxSLOTS, such as default:0-4x1. On AWS, the description of a pool may
end with instance types, such as default:0-4x1@m7i.large,m6i.large.
"""

from __future__ import annotations

import html
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from batchlab.cli import options, output
from batchlab.cli.groups import command_group
from batchlab.cli.option_values import cap_of, cap_text, connect, home_of, no_grid, parse_pools
from batchlab.cli.options import (
    AS_IF,
    BACKEND,
    CAP,
    ENDPOINT,
    HOME,
    JSON,
    LOG_FORMAT,
    MAX_COST,
    POOL,
    argument,
    flag,
    option,
)
from batchlab.core.capabilities import capabilities_of
from batchlab.core.container_images import name_of
from batchlab.core.errors import BackendError, Refused, Unreachable, UsageError

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.core.api_types import GridView, PoolView, SessionView
    from batchlab.runtime.home import Home

WATCH_INTERVAL_S = 1.0

_POOL_COLUMNS = ("pool", "min", "max", "desired", "inservice", "pending", "slots", "backlog", "set by")

app = command_group("grid")


@app.callback()
def grid() -> None:
    """Start, inspect, scale, and stop a grid.

    \b
    Example: batchlab grid up --pool default:0-4x1
    """


@app.command()
def up(
    pool: list[str] | None = POOL,
    home: Path | None = HOME,
    backend: str = BACKEND,
    endpoint: str | None = ENDPOINT,
    max_cost: str | None = MAX_COST,
    port: int = option(
        "Port of the manager on 127.0.0.1. With 0, the manager uses a free port.", default=0, min=0, max=65535
    ),
    log_format: str | None = LOG_FORMAT,
    json: bool = JSON,
) -> None:
    """Start a grid and keep the grid running. Unfinished jobs of the grid continue.

    \b
    Example: batchlab grid up --pool default:0-4x1 --pool big:0-1x4
    """
    from batchlab.cli import schedule
    from batchlab.cli.session import Session
    from batchlab.core import logs
    from batchlab.runtime import factory

    place, pools = home_of(home), parse_pools(pool or ())
    cap = cap_of(max_cost) if max_cost else None
    logs.set_format(log_format)
    place.require_folder()
    was_up = place.record() is not None
    if was_up and pools:
        raise Refused(
            f"A grid is up in {place.path} already.",
            remedy="`batchlab grid scale` changes its limits; for other pools, take it down first.",
        )
    grid = factory.load(backend, endpoint)
    with Session(place, grid, pools, keep_up=True, port=port) as session:
        session.start()
        if was_up and grid.capabilities.container_manager:
            from batchlab.runtime import container_grid

            container_grid.resume(place, grid, output.say)
        if max_cost:
            session.call(lambda client: client.cap_grid(cap))
        view = session.call(lambda client: client.grid())
        notes = session.call(schedule.read_schedules)["notes"]
    if grid.capabilities.remote_manager:
        output.say("Connected to the stack; `batchlab grid down` disconnects.")
    else:
        output.say(f"A grid {'was up already' if was_up else 'is up'} in {place.path}.")
        if home is None:  # With --home, the suggested commands would also need --home.
            output.say(
                "`batchlab job submit FILE` submits a job, `batchlab grid open` shows the grid in a browser, "
                "`batchlab grid down` stops it."
            )
    for note in notes:
        output.say(f"Note: {output.clean(note)}")
    _show_grid(view, place, json=json)


@app.command()
def down(home: Path | None = HOME) -> None:
    """Stop the grid.

    Workers return unfinished work. The command also ends the workers of a killed manager, and
    programs that tasks have left running. Unfinished jobs continue when a grid is started again in the
    same folder. The command deletes the grid's own LocalStack with all its data, so fetch the
    results of your jobs first. On AWS, the command only disconnects from the stack.

    \b
    Example: batchlab grid down
    """
    from batchlab.cli import schedule
    from batchlab.runtime import compose_deployment
    from batchlab.runtime.manager_process import kill_leftovers, settled_record, stop_manager

    place = home_of(home)
    place.require_folder()
    record = settled_record(place)
    if record and capabilities_of(record.backend).remote_manager:
        stop_manager(place)
        output.say("Disconnected. The stack stays: `batchlab deploy destroy` takes it down.")
        return
    has_containers = compose_deployment.read(place) is not None
    if record is None and not has_containers:
        if kill_leftovers(place):
            output.say(f"The manager of the grid in {place.path} had ended. The grid's other processes are ended now.")
        else:
            output.say(f"No grid is up in {place.path}.")
        return
    unfinished = scheduled = 0
    try:
        if record is None:
            raise no_grid(place)
        with connect(place) as client:
            unfinished = len(client.jobs(active=True, limit=1000))
            schedules = schedule.read_schedules(client)["schedules"]
            scheduled = sum(one["state"] == "active" for one in schedules)
    except BackendError as error:
        # An error must not end the command, because `grid down` also stops a manager that does not respond.
        why = error.message if place.record() else "Its manager is not up."
        output.say(f"The unfinished jobs of the grid are unknown: {why}")
    emulator = place.place(compose_deployment.NAME)
    is_lost = has_containers and emulator is not None and not emulator.named
    stop_manager(place)
    output.say(f"The grid in {place.path} is down.")
    if unfinished:
        outcome = ", and deleted with the grid" if is_lost else ": `batchlab grid up` continues"
        output.say(f"{output.count(unfinished, 'unfinished job')}{outcome}.")
    if scheduled:
        outcome = "deleted with the grid" if is_lost else "will not run until a grid is up here again"
        output.say(f"{output.count(scheduled, 'schedule')} {outcome}.")


@app.command()
def status(
    watch: bool = flag("Show the status again every second.", "--watch"),
    as_if_aws: bool = AS_IF,
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Show the pools and queues of the grid, and on AWS the cost of the grid.

    \b
    Example: batchlab grid status --watch
    """
    from batchlab.cli.bills import LiveCost

    place = home_of(home)
    live_cost = LiveCost(place, as_if_aws=as_if_aws)
    with connect(place) as client:
        while True:
            services = _services(place)
            try:
                view = client.grid()
            except BackendError as error:
                if not (failed := _failed(services)):
                    raise
                raise Unreachable(f"{error.message} {' '.join(failed)}", remedy=_RESUME) from error
            cost = live_cost.grid(client) if live_cost.applies(view["backend"]) else None
            _show_grid(view, place, json=json, cost=cost, services=services)
            if not watch:
                return
            time.sleep(WATCH_INTERVAL_S)
            if not json:
                output.show("")


def _services(home: Home) -> Mapping[str, str]:
    """Return the states of the grid's containers, or nothing for a grid without containers."""
    from batchlab.runtime import compose_deployment

    at = compose_deployment.read(home)
    if at is None:
        return {}
    from batchlab.runtime.compose_project import Project

    return Project(home, at, settings={}).states()


_RESUME = "`batchlab grid up` starts a container that has ended."


def _failed(services: Mapping[str, str]) -> list[str]:
    """Return a sentence for each container that does not work."""
    return [
        f"The container of {service} is {state}." for service, state in sorted(services.items()) if state != "healthy"
    ]


def _show_grid(
    view: GridView,
    home: Home,
    *,
    json: bool,
    cost: Mapping[str, object] | None = None,
    services: Mapping[str, str] = MappingProxyType({}),
) -> None:
    if json:
        more = {"cost": cost, "services": services}
        output.show_json({**view, **{name: value for name, value in more.items() if value}})
        return
    leads = "leads" if view["leader"] else "does not lead yet"
    record = home.record()
    at = f" at {record.url}" if record else ""
    lines = [f"backend {view['backend']}, manager {view['owner']} {leads}{at}"]
    if place := home.place(view["backend"]):
        lines.append(f"bucket {place.bucket} at {place.url}")
    if cost:
        lines.append(f"The grid {cost['text']}.")
    if failed := _failed(services):
        lines.append(f"{' '.join(failed)} {_RESUME}")
    if trouble := view.get("trouble", ""):
        lines.append(trouble)
    if unreadable := view.get("unreadable", 0):
        lines.append(
            f"The manager rejected {unreadable:,} unreadable or unexpected messages and objects. Its log names each. "
            "`batchlab job why JOB` lists those of a job."
        )
    columns: tuple[str, ...] = _POOL_COLUMNS
    rows = [_pool_row(pool) for pool in view["pools"]]
    if any(pool.get("gpus") for pool in view["pools"]):
        columns = (*columns, "gpus")
        rows = [(*row, f"{_busy_gpus(pool)} of {_gpus(pool)}") for row, pool in zip(rows, view["pools"], strict=True)]
    lines += ["", output.table(columns, rows)]
    for pool in view["pools"]:
        if image := pool.get("image", ""):
            lines.append(output.clean(f"The workers of pool {pool['name']} run in the image {image}."))
        if problem := pool["trouble"]:
            lines.append(
                output.clean(
                    f"{problem[:1].upper()}{problem[1:]}. The instance log has the reason. "
                    f"`batchlab grid scale {pool['name']} --auto` starts instances again at once."
                )
            )
        if problem := pool.get("end_trouble", ""):
            lines.append(output.clean(f"Pool {pool['name']}: {problem}."))
    depths = [(queue["name"], queue["visible"], queue["in_flight"], queue["delayed"]) for queue in view["queues"]]
    output.show("\n".join([*lines, "", output.table(("queue", "visible", "in flight", "delayed"), depths)]))


def _busy_gpus(pool: PoolView) -> int:
    return sum(instance.get("busy_gpus", 0) for instance in pool["instances"])


def _gpus(pool: PoolView) -> int:
    """Return the number of GPUs of the pool's instances in service."""
    return pool.get("gpus", 0) * sum(instance["state"] == "InService" for instance in pool["instances"])


def _pool_row(pool: PoolView) -> tuple[object, ...]:
    states = [instance["state"] for instance in pool["instances"]]
    sizes = (pool["min"], pool["max"], pool["desired"], states.count("InService"), states.count("Pending"))
    backlog = f"{pool['backlog_tasks']} tasks, {output.span(pool['backlog_s'])}"
    return (pool["name"], *sizes, pool["slots"], backlog, "hand" if pool["held_by_hand"] else "policy")


@app.command()
def env(home: Path | None = HOME, json: bool = JSON) -> None:
    """Print shell variables for the AWS CLI and other clients of the grid's S3 and SQS.

    The backend `local` does not have an endpoint.

    \b
    Example: eval "$(batchlab grid env)" && aws s3 ls "s3://$BATCHLAB_BUCKET/jobs/"
    """
    from batchlab.cli.session import Session
    from batchlab.runtime import factory

    place = home_of(home)
    place.require_folder()
    with Session.attach(place) as session:
        backend = session.backend
    variables = factory.client_environment(backend, place)
    if not variables:
        raise UsageError(
            f"A grid on {backend.name} does not have an endpoint.",
            remedy=f"Its bucket is the folder {place.objects}, which job files call s3://{backend.bucket(place)}/.",
        )
    if json:
        output.show_json(variables)
    else:
        for name, value in variables.items():
            output.show(f"export {name}={shlex.quote(value)}")


@app.command()
def workers(home: Path | None = HOME, json: bool = JSON) -> None:
    """List the instances of the grid and their workers.

    \b
    Example: batchlab grid workers
    """
    with connect(home) as client:
        view = client.grid()
    instances: list[dict[str, object]] = []
    rows: list[tuple[object, ...]] = []
    has_gpus = any(pool.get("gpus") for pool in view["pools"])
    for pool in view["pools"]:
        image = pool.get("image", "")  # A manager of an earlier release does not send the image.
        for instance in pool["instances"]:
            instances.append({"pool": pool["name"], "image": image, **instance})
            health = "Healthy" if instance["healthy"] else "Unhealthy"
            state = (instance["state"], health, "yes" if instance["protected"] else "no")
            work = [instance["worker"] or "-", instance["busy"], instance["held"]]
            if has_gpus:
                work.append(f"{instance.get('busy_gpus', 0)} of {pool.get('gpus', 0)}")
            launched = output.moment(instance["launched_s"])
            rows.append((instance["id"], pool["name"], *state, *work, launched, name_of(image), instance["note"]))
    work_columns = ("worker", "busy", "held", *(["gpus"] if has_gpus else []))
    columns = ("instance", "pool", "state", "health", "protected", *work_columns, "launched", "image", "note")
    output.listing(json, instances, columns, rows, "There are no instances. The manager launches them for work.")


@app.command()
def activities(
    pool: str | None = argument(
        "Name of the pool whose activities are listed. Default: all pools.",
        "POOL",
        default=None,
        autocompletion=options.pools,
    ),
    limit: int = option("Maximum number of listed activities.", default=50, min=1),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """List the scaling activities of the pools with their causes, from new to old.

    \b
    Example: batchlab grid activities default
    """
    with connect(home) as client:
        views = client.activities(pool=pool, limit=limit)
    output.listing(
        json,
        views,
        ("at", "pool", "status", "what", "why"),
        [(output.moment(a["at_s"]), a["pool"], a["status"], a["description"], a["cause"]) for a in views],
        "There has been no scaling activity.",
    )


@app.command()
def scale(
    pool: str = argument("Name of the pool.", "POOL", autocompletion=options.pools),
    smallest: int | None = option("Minimum number of instances in the pool.", None, "--min", min=0),
    largest: int | None = option("Maximum number of instances in the pool.", None, "--max", min=0),
    desired: int | None = option(
        "Desired capacity of the pool. The autoscaler does not change the pool until --auto.", min=0
    ),
    auto: bool = flag("Let the autoscaler set the desired capacity of the pool again.", "--auto"),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Change the limits of a pool, or set the pool's desired capacity.

    \b
    Example: batchlab grid scale default --max 8
    """
    if smallest is largest is desired is None and not auto:
        raise UsageError("Nothing to change.", remedy="Say --min, --max, --desired or --auto.")
    if desired is not None and auto:
        raise UsageError("--desired and --auto exclude each other.", remedy="Say one of them.")
    with connect(home) as client:
        view = client.scale(pool, min=smallest, max=largest, desired=desired, auto=True if auto else None)
    output.answer(json, view, output.table(_POOL_COLUMNS, [_pool_row(view)]))


@app.command()
def drain(
    pool: str | None = argument(
        "Name of the pool that is drained. Default: all pools.", "POOL", default=None, autocompletion=options.pools
    ),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Stop the workers of one pool or of all pools gracefully, and keep the pools empty until `grid scale --auto`.

    \b
    Example: batchlab grid drain default
    """
    with connect(home) as client:
        view = client.drain(pool)
    output.answer(json, view, output.table(_POOL_COLUMNS, map(_pool_row, view["pools"])))


@app.command()
def cap(amount: str = CAP, home: Path | None = HOME, json: bool = JSON) -> None:
    """Cap the cost of the grid on AWS. At the cap, no instance is launched, and running tasks finish.

    The cap counts from the first day of the grid's account. `grid status` shows the cost so far.

    \b
    Example: batchlab grid cap 50USD
    """
    usd = cap_of(amount)
    with connect(home) as client:
        view = client.cap_grid(usd)
    output.answer(json, view, f"The cost of the grid is {cap_text(usd)}.")


@app.command("rebuild-ledger")
def rebuild_ledger(home: Path | None = HOME, json: bool = JSON) -> None:
    """Rebuild the ledger from the bucket, which contains all durable state.

    Unreadable objects do not stop the rebuild. The command lists the unreadable objects at the end.

    \b
    Example: batchlab grid rebuild-ledger
    """
    with connect(home) as client:
        view = client.rebuild_ledger()
    # A manager of an earlier version stops the rebuild at the first unreadable object, so its response lacks the key
    # "unreadable".
    unreadable = view.get("unreadable", [])
    lines = [f"The ledger is rebuilt: {output.count(view['jobs'], 'job')}."]
    lines += [f"Not read: {problem['key']}: {problem['reason']}" for problem in unreadable]
    output.answer(json, {"jobs": view["jobs"], "unreadable": unreadable}, "\n".join(lines))


PREFIX, SUFFIX = "open-", ".html"
_LOOK_S = 0.2
_SOONER_S = 2.0
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="referrer" content="no-referrer">
<meta http-equiv="refresh" content="0; url={url}">
<title>batchlab</title>
</head>
<body><a href="{url}">The grid's page</a></body>
</html>
"""


@app.command("open")
def open_(
    browser: bool = option(
        "Open the web page in a browser, or only print the address of the web page.",
        None,
        "--browser/--no-browser",
        default=True,
    ),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Open the grid's web page, which shows jobs, failures, the fleet, and costs.

    The address works once, within a minute.

    \b
    Example: batchlab grid open --no-browser
    """
    place = home_of(home)
    with connect(place) as client:
        session = client.open_session()
        url = f"{client.url}{session['path']}"
        if json:
            output.show_json({"url": url, "valid_s": session["valid_s"]})
        elif browser and _has_screen() and _handed_over(client, place, session, url):
            output.say("The page is open in your browser.")
        else:
            output.show(url)
            output.say(f"This address works once, within {session['valid_s']:.0f} s.")


def _handed_over(client: Client, home: Home, session: SessionView, url: str) -> bool:
    """Open the URL of the web page in a browser. Return False if no browser can be started, or if the grid's folder
    cannot be written.

    Raise Refused if the browser does not request the page before the one-time code expires.
    """
    try:
        file = _redirect(home, url, session["valid_s"])
    except OSError:
        return False  # If the grid's folder cannot be written, the caller prints the URL.
    try:
        if not _opened(file.as_uri()):
            return False
        # Stop waiting before the one-time code expires, because the manager reports an expired code as used.
        until_s = time.monotonic() + session["valid_s"] - _SOONER_S
        while client.code_waits(session["name"]):
            if time.monotonic() >= until_s:
                break
            time.sleep(_LOOK_S)
        else:
            return True
    finally:
        file.unlink(missing_ok=True)
    raise Refused(
        "A browser was started for the page, and has not requested it in time.",
        remedy="`batchlab grid open --no-browser` prints an address to open by hand. One that is "
        f"kept in a box of its own, as a snap is, may not be allowed to read {home.path}.",
    )


def _redirect(home: Home, url: str, valid_s: float) -> Path:
    """Write an HTML file that redirects a browser to the URL. Only the user can read the HTML file.

    The HTML file is in the grid's folder, because some browsers cannot read the user's /tmp.
    """
    for old_file in home.path.glob(f"{PREFIX}*{SUFFIX}"):
        with suppress(FileNotFoundError):  # Another command may have removed the old file.
            if time.time() - old_file.stat().st_mtime > valid_s:
                old_file.unlink()  # A command that was killed left the old file.
    number, name = tempfile.mkstemp(SUFFIX, PREFIX, home.path)
    with os.fdopen(number, "w", encoding="utf-8") as file:
        file.write(_PAGE.format(url=html.escape(url)))
    return Path(name)


def _has_screen() -> bool:
    """Return whether a browser can open a window. Without a display, a text browser would take over the terminal."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))


def _opened(address: str) -> bool:
    """Start a browser, and return whether a browser was started."""
    import webbrowser

    try:
        return webbrowser.open(address)
    except webbrowser.Error:
        return False
