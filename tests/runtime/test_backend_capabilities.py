"""Capabilities of the backends, as their descriptors list them."""

from __future__ import annotations

from dataclasses import fields

import pytest

from batchlab.core.model import NO_CAPABILITIES, Capabilities
from batchlab.runtime import factory


def test_an_unknown_backend_has_no_capability() -> None:
    assert factory.capabilities_of("nothing") == NO_CAPABILITIES


@pytest.mark.parametrize("name", factory.names())
def test_a_loaded_backend_has_the_capabilities_that_its_descriptor_lists(name: str) -> None:
    found = factory.load(name).capabilities
    assert found == factory.capabilities_of(name)
    assert found != NO_CAPABILITIES


def test_each_capability_belongs_to_some_backend_and_not_to_all() -> None:
    known = [factory.capabilities_of(name) for name in factory.names()]
    for one in fields(Capabilities):
        assert {getattr(found, one.name) for found in known} == {True, False}, one.name
