"""Capabilities of the backends, as their descriptors list them."""

from __future__ import annotations

from dataclasses import fields

import pytest

from batchlab import backends
from batchlab.model import NO_CAPABILITIES, Capabilities


def test_an_unknown_backend_has_no_capability() -> None:
    assert backends.capabilities_of("nothing") == NO_CAPABILITIES


@pytest.mark.parametrize("name", backends.names())
def test_a_loaded_backend_has_the_capabilities_that_its_descriptor_lists(name: str) -> None:
    found = backends.load(name).capabilities
    assert found == backends.capabilities_of(name)
    assert found != NO_CAPABILITIES


def test_each_capability_belongs_to_some_backend_and_not_to_all() -> None:
    known = [backends.capabilities_of(name) for name in backends.names()]
    for one in fields(Capabilities):
        assert {getattr(found, one.name) for found in known} == {True, False}, one.name
