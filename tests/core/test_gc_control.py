"""Garbage collection, which is off while a service loads and on afterwards."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

from batchlab.cli.startup import SERVICES

SERVICE_MODULES = {
    "manager": "batchlab.server.manager_service",
    "worker": "batchlab.server.worker_service",
    "connect": "batchlab.client.aws_connection",
}
SCRIPT = """
import gc
from batchlab.core import gc_control
gc_control.pause()
assert not gc.isenabled()
gc_control.resume()
assert gc.isenabled()
assert gc.get_freeze_count() > 1000
"""


def test_objects_that_exist_after_loading_are_frozen() -> None:
    """The test uses its own process, because freezing objects cannot be undone."""
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_reports_the_end_of_its_loading(service: str) -> None:
    """A service that does not report the end of its loading would never free memory."""
    module = importlib.import_module(SERVICE_MODULES[service])
    assert "gc_control.resume()" in inspect.getsource(module)
