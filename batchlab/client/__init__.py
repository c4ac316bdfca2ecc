"""Python API, executors, and HTTP client of a grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchlab.client.http import Client

__all__ = ["Client"]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from batchlab.client.http import Client

        return Client
    raise AttributeError(f"module 'batchlab.client' has no attribute {name!r}")
