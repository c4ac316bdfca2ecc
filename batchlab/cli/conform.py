"""`conform`: does an endpoint behave as S3 and SQS do, where batchlab relies on it?"""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
