"""A number on the command line that is none, or out of range, in a sentence.

Invariant: an option is called by its name, an argument as the help calls it, and the range that is
said is the one that is declared.
"""

from __future__ import annotations

from typing import Any

from typer import BadParameter

from batchlab.errors import UsageError

_KINDS = {
    "greater_than_equal": "a number",
    "less_than_equal": "a number",
    "float_parsing": "a number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
}
"""What is asked for, by the mistakes that the parser of values knows by these names."""


def plainly(error: BadParameter) -> UsageError | None:
    """The same as a person would say it; None where it is about something else than a number."""
    # By Any: which classes these are is typer's own business.
    option: Any = error.param
    mistakes: Any = getattr(error.__cause__, "errors", None)
    if option is None or mistakes is None:
        return None
    first = mistakes()[0]
    kind = _KINDS.get(first["type"])
    if kind is None:
        return None
    name = next((one for one in option.opts if one.startswith("-")), "")
    range_ = _range(option.min, option.max)
    return UsageError(
        f"{name or option.metavar} is {kind}{range_}, not {str(first['input'])[:40]}.",
        remedy=f"Write for example {name}{' ' if name else ''}{_example(option):g}.",
    )


def _range(least: float | None, most: float | None) -> str:
    if most is None:
        return "" if least is None else f" from {least:g} on"
    return f" up to {most:g}" if least is None else f" from {least:g} to {most:g}"


def _example(option: Any) -> float:
    usual, least = option.default, option.min
    return float(usual if isinstance(usual, int | float) else max(1, least or 0))
