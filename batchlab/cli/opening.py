"""`batchlab grid open`: the web page of the grid that is up.

Invariant: the grid's token is in no address. What is opened has a code that works once, in the part
of the address that no server sees and no log keeps. On no command line, which everybody on the
machine can read, is more than the name of a file that only its owner can.
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
from batchlab.errors import Refused

if TYPE_CHECKING:
    from batchlab.client import Client
    from batchlab.home import Home
    from batchlab.views import SessionView

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
