"""`batchlab grid open`: the web page of the grid that is up.

Invariant: the grid's token is in no address. What is opened has a code that works once, in the part
of the address that no server sees and no log keeps.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from batchlab.cli import output
from batchlab.cli.options import HomeOption, JsonOption, home_of


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

    with connect(home_of(home)) as client:
        session = client.open_session()
        url = f"{client.url}{session['path']}"
    if json:
        output.show_json({"url": url, "valid_s": session["valid_s"]})
    elif browser and _opened(url):
        output.say("The page is open in your browser.")
    else:
        output.show(url)
        output.say(f"This address works once, within {session['valid_s']:.0f} s.")


def _opened(url: str) -> bool:
    """Whether a browser was told to open it: not a text one, which would take the terminal."""
    import webbrowser

    has_screen = sys.platform == "darwin" or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
    try:
        return has_screen and webbrowser.open(url)
    except webbrowser.Error:
        return False
