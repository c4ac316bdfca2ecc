"""The view to submit a job: its folder, or its parts, sent by the browser."""

from __future__ import annotations

import secrets

from fastapi import Request
from fastapi.responses import Response

from batchlab.api.common import Leader
from batchlab.api.files import MOST_BYTES, MOST_FILES, submit_form
from batchlab.web import words
from batchlab.web.rendering import render
from batchlab.web.shared import form_of, guarded, to

router = guarded()


@router.get("/submit")
async def submit_page(request: Request) -> Response:
    """The form. It brings a client token, so that sent twice it makes one job."""
    return render(
        request,
        "submit.html",
        here="submit",
        client_token=secrets.token_urlsafe(16),
        most_gib=MOST_BYTES // 2**30,
        most_files=MOST_FILES,
    )


@router.post("/submit")
async def submit(request: Request, manager: Leader) -> Response:
    """Submit what was sent, and go on to the job."""
    form = await form_of(request)
    try:
        view = await submit_form(manager, form)
    finally:
        await form.close()
    return to(request, f"/jobs/{words.path(view['id'])}")
