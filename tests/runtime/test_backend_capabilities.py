"""Capabilities of the backends, as their descriptors list them."""

from __future__ import annotations

from dataclasses import fields

import pytest

from batchlab.core.capabilities import NO_CAPABILITIES, Capabilities, backend_names, capabilities_of
from batchlab.runtime import factory


def test_an_unknown_backend_has_no_capability() -> None:
    assert capabilities_of("nothing") == NO_CAPABILITIES


@pytest.mark.parametrize("name", backend_names())
def test_a_loaded_backend_has_the_capabilities_that_its_descriptor_lists(name: str) -> None:
    found = factory.load(name).capabilities
    assert found == capabilities_of(name)
    assert found != NO_CAPABILITIES


def test_each_capability_belongs_to_some_backend_and_not_to_all() -> None:
    known = [capabilities_of(name) for name in backend_names()]
    for field in fields(Capabilities):
        assert {getattr(found, field.name) for found in known} == {True, False}, field.name
