"""`batchlab grid open`: the web page of the running grid.

Invariant: no address contains the grid's token. The address contains a one-time code in its
fragment, which browsers do not send to servers. A browser gets the address through a file that only
the user can read, because other users can read command lines.

A pool as text: NAME:MIN-MAXxSLOTS, as in default:0-4x1; on AWS with @TYPE,TYPE behind it.
"""

from __future__ import annotations

import html
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output
from batchlab.cli.options import HomeOption, JsonOption, home_of
from batchlab.core.errors import Refused

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
            help="Open the page in a browser, or only print its address.",
        ),
    ] = True,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Open the grid's web page: jobs, failures, fleet, costs.

    The address works once, within a minute. Each call of this command creates a new one.

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
    """Open the address in a browser; return False if no browser can be started.

    Raise Refused if a started browser does not request the page in time.
    """
    try:
        file = _redirect(home, url, session["valid_s"])
    except OSError:
        return False  # the folder cannot be written, so the address is printed instead
    try:
        if not _opened(file.as_uri()):
            return False
        # Stop before the code expires: an expired code does not count as waiting.
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
    """Write a file that redirects to the address, which only the user can read.

    It is in the grid's folder, because some browsers have a /tmp of their own.
    """
    for left in home.path.glob(f"{PREFIX}*{SUFFIX}"):
        with suppress(FileNotFoundError):  # removed by another command
            if time.time() - left.stat().st_mtime > valid_s:
                left.unlink()  # left behind by a killed command
    number, name = tempfile.mkstemp(SUFFIX, PREFIX, home.path)
    with os.fdopen(number, "w", encoding="utf-8") as file:
        file.write(_PAGE.format(url=html.escape(url)))
    return Path(name)


def _has_screen() -> bool:
    """Whether a browser can open a window. A text browser would use the terminal."""
    return sys.platform == "darwin" or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )


def _opened(address: str) -> bool:
    """Start a browser; return whether one was started."""
    import webbrowser

    try:
        return webbrowser.open(address)
    except webbrowser.Error:
        return False
