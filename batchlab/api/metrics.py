"""The endpoint that Prometheus scrapes; as every other it asks for the token."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response

from batchlab.api.common import Given, authorised

router = APIRouter(dependencies=[Depends(authorised)])


@router.get("/metrics", include_in_schema=False)
async def metrics(served: Given, request: Request) -> Response:
    """What Prometheus is shown, also of a manager that does not lead."""
    from batchlab.metrics import exposition

    accept = request.headers.get("accept", "")
    content, kind = exposition(served.manager, served.backend_name, accept)
    # Not `media_type`, to which a charset would be added once more.
    return Response(content, headers={"Content-Type": kind})
