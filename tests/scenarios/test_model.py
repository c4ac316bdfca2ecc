"""Properties of the values of scenarios and of their runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from batchlab.core.errors import UsageError
from batchlab.scenarios import record
from batchlab.scenarios.model.values import Fault, FaultName
from tests.support.scenarios.records import a_record


@pytest.mark.parametrize(
    ("share", "count", "there", "hit"),
    [
        (0.5, None, 5, 3),
        (0.14, None, 50, 7),
        (0.28, None, 25, 7),
        (1.0, None, 4, 4),
        (0.01, None, 3, 1),
        (0.0, None, 3, 0),
        (1.0, 2, 5, 2),
        (1.0, 9, 5, 5),
    ],
)
def test_a_share_is_rounded_up_and_by_no_hair_more(share: float, count: int | None, there: int, hit: int) -> None:
    assert Fault(FaultName.KILL, 0.0, share=share, count=count).among(there) == hit


def test_record_of_another_version_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    record.write(a_record(), file)
    assert record.read(file) == a_record()
    record.write(replace(a_record(), version=record.VERSION + 1), file)
    with pytest.raises(UsageError, match=f"of version {record.VERSION + 1}; .* reads version"):
        record.read(file)
    # A later version may have other fields.
    file.write_text('{"version": 9, "runs": []}')
    with pytest.raises(UsageError, match="of version 9"):
        record.read(file)
    for text in ("[]", "{}", '{"version": 1}', "not JSON"):
        file.write_text(text)
        with pytest.raises(UsageError, match="not a record of a scenario's run"):
            record.read(file)
    file.write_text("not JSON")
    with pytest.raises(UsageError, match=r"not a record of a scenario's run \(1 mistake in it\)\."):
        record.read(file)
