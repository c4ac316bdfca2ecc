"""Test parameters of the contract suites that run at emulators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet

from tests.support.aws.emulators import EMULATORS

Exceptions = Mapping[str, tuple[str, tuple[str, ...]]]
"""The exceptions by the name of a check: a reason, and the emulators that the exception concerns."""


def at_emulators(check: Callable[..., Any], differences: Exceptions, untried: Exceptions) -> list[ParameterSet]:
    """Return one parameter for each emulator.

    A check that an emulator is known to break must fail there. A check that is untried at an
    emulator is skipped.
    """
    rule, broken_by = differences.get(check.__name__, ("", ()))
    reason, left_out = untried.get(check.__name__, ("", ()))
    params = []
    for emulator in EMULATORS:
        marks = [pytest.mark.slow]
        if emulator in broken_by:
            marks.append(pytest.mark.xfail(reason=rule, raises=AssertionError))
        elif emulator in left_out:
            marks.append(pytest.mark.skip(reason=reason))
        params.append(pytest.param(emulator, marks=marks))
    return params
