"""Users of a grid over HTTP, and all protected routes of its API and its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from batchlab.client.http import Client
from batchlab.server.http.permissions import Route, Rule
from tests.support.server.api import Rig


def add(rig: Rig, name: str, role: str, **options: Any) -> str:
    """Add a user, or replace the user with the name, and return the token."""
    return rig.client.add_user(name, role, replace=True, **options)["token"]


def client_of(rig: Rig, token: str) -> Client:
    return Client(rig.url, token)


def request(rig: Rig, token: str, method: str, path: str, **options: Any) -> httpx.Response:
    return rig.http.request(method, path, headers={"Authorization": f"Bearer {token}"}, **options)


def filled(path: str, job: str) -> str:
    """Return the path of a route with values for its parameters."""
    return path.format(job=job, stage="map", task=0, pool="default", name="nightly", target="ops", fingerprint="x")


def changes(rules: Mapping[Route, Rule]) -> list[tuple[str, str, Rule]]:
    """Return the method, the path template, and the rule of each route that not every user may use."""
    return [(*route, rule) for route, rule in rules.items() if rule.role != "view"]
