"""Sign-in page, and the end of a session."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from batchlab.server.http.authentication import PAGE
from batchlab.server.http.common import Given
from batchlab.server.http.sessions import SESSION_S
from batchlab.server.web.rendering import render
from batchlab.server.web.security import SESSION, below
from batchlab.server.web.shared import field_of, form_of, guarded

router = APIRouter()
"""Routes without a form token, because a visitor gets a session only by signing in."""
inside = guarded()

LONGEST = 200


@router.get("/login")
async def login_page(request: Request) -> Response:
    """Ask for the token. The address that `grid open` shows contains a code in its fragment."""
    return render(request, "login.html", refused=False)


@router.post("/login")
async def log_in(request: Request, served: Given) -> Response:
    """Start a session."""
    word = field_of(await form_of(request), "word")
    if not word or len(word) > LONGEST or not served.sessions.opens(word):
        return render(request, "login.html", status=403, refused=True)
    session, value = served.sessions.begin()
    place = served.sessions.place(session)
    answer = RedirectResponse(f"{below(place)}/", 303)
    answer.set_cookie(
        served.sessions.cookie(place),
        value,
        max_age=int(SESSION_S),
        path=below(place),
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return answer


@inside.post("/logout")
async def log_out(request: Request, served: Given) -> Response:
    """End the session. Its cookie becomes invalid in every browser."""
    session = request.scope[SESSION]
    place = served.sessions.place(session)
    served.sessions.close(session)
    answer = RedirectResponse(f"{PAGE}/login", 303)
    name = served.sessions.cookie(place)
    answer.delete_cookie(name, path=below(place), httponly=True, samesite="strict")
    return answer


router.include_router(inside)
