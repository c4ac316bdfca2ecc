"""Damaged scenario files, which are loaded or are refused with the file and the line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchlab.jobs.yaml_source import JobFileErrors
from batchlab.scenarios.model import loader
from tests.support.mistakes import altered, complete, mangled
from tests.support.properties import SLOW

SHIPPED = [scenario.path for scenario in loader.shipped_scenarios()]


@pytest.mark.parametrize("spoil", [mangled, altered])
@settings(SLOW)
@given(data=st.data())
def test_a_shipped_scenario_that_was_spoilt_loads_or_is_refused_with_lines_and_remedies(
    spoil: Callable[[str], st.SearchStrategy[str]], data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from(SHIPPED))
    text = data.draw(spoil(path.read_text()))
    try:
        loader.parse(text, path)
    except JobFileErrors as errors:
        for error in complete(errors.errors, path, text):
            assert error.line is not None, error
