"""`batchlab grid open`: the web page of the grid that is up.

Invariant: the grid's token is in no address. What is opened has a code that works once, in the part
of the address that no server sees and no log keeps. On no command line, which everybody on the
machine can read, is more than the name of a file that only its owner can.

A pool as text: NAME:MIN-MAXxSLOTS, as in default:0-4x1; on AWS with @TYPE,TYPE behind it.
"""

from __future__ import annotations

import html
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output
from batchlab.cli.options import HomeOption, JsonOption, home_of
from batchlab.core.errors import Refused, UsageError
from batchlab.core.model import Pool

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.core.api_types import SessionView
    from batchlab.runtime.home import Home

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


def open_(
    browser: Annotated[
        bool,
        typer.Option(
            "--browser/--no-browser",
            help="Open it here, or only print its address.",
        ),
    ] = True,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Open the grid's web page: jobs, failures, fleet, costs.

    The address works once, and for a minute; then this command makes another one.

    \b
    Example: batchlab grid open --no-browser
    """
    from batchlab.cli.session import connect

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
    """Have a browser go to the address; False where there is none that would. Refused where one was
    told to, and did not come."""
    try:
        file = _redirect(home, url, session["valid_s"])
    except OSError:
        return False  # no room, or a folder of somebody else's: the address is shown instead
    try:
        if not _opened(file.as_uri()):
            return False
        # Sooner than the code is over: one that is over does not wait either.
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
        "A browser was told to open the page, and has not come in time.",
        remedy="`batchlab grid open --no-browser` prints an address to open by hand. One that is "
        f"kept in a box of its own, as a snap is, may not be allowed to read {home.path}.",
    )


def _redirect(home: Home, url: str, valid_s: float) -> Path:
    """A file that leads to the address, readable by its owner alone. In the grid's folder, since
    some browsers have a /tmp of their own."""
    for left in home.path.glob(f"{PREFIX}*{SUFFIX}"):
        with suppress(FileNotFoundError):  # by another command of this kind
            if time.time() - left.stat().st_mtime > valid_s:
                left.unlink()  # its command was killed
    number, name = tempfile.mkstemp(SUFFIX, PREFIX, home.path)
    with os.fdopen(number, "w", encoding="utf-8") as file:
        file.write(_PAGE.format(url=html.escape(url)))
    return Path(name)


def _has_screen() -> bool:
    """Whether a browser would have a window: a text one would take the terminal."""
    return sys.platform == "darwin" or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )


def _opened(address: str) -> bool:
    """Whether a browser was told to open it."""
    import webbrowser

    try:
        return webbrowser.open(address)
    except webbrowser.Error:
        return False


_FORM = re.compile(r"([a-z0-9][a-z0-9_-]{0,39}):(\d{1,5})-(\d{1,5})x(\d{1,4})")


def parse(text: str) -> Pool:
    """The pool that `text` describes; UsageError."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise UsageError(
            f"The pool {text!r} is not NAME:MIN-MAXxSLOTS.",
            remedy="Write for example default:0-4x1: no to four instances with one slot each. A "
            "name has up to 40 small letters, digits, '-' and '_'.",
        )
    smallest, largest, slots = (int(number) for number in found.groups()[1:])
    pool = Pool(found[1], smallest, largest, slots)
    if pool.min_size > pool.max_size or pool.slots < 1:
        raise UsageError(
            f"The pool {text!r} needs MIN ≤ MAX and at least one slot.",
            remedy="Write for example default:0-4x1.",
        )
    return pool


def parse_typed(text: str) -> tuple[Pool, tuple[str, ...]]:
    """The pool that `text` describes, and the instance types it names; UsageError."""
    form, at, types = text.partition("@")
    names = tuple(one.strip() for one in types.split(","))
    if at and not all(names):
        raise UsageError(
            f"The pool {text!r} lacks an instance type after '@'.",
            remedy="Write for example default:0-4x1@m7i.large,m6i.large.",
        )
    return parse(form), names if at else ()


def parse_all(texts: Iterable[str]) -> list[Pool]:
    """The pools; UsageError, also where two share a name."""
    pools = [parse(text) for text in texts]
    names = [pool.name for pool in pools]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"The pool {name!r} is given twice.", remedy="Give each pool one --pool."
            )
    return pools
