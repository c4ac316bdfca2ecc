"""The transfer of a code folder to the workers. The folder arrives unchanged, or the client refuses it."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import UsageError
from batchlab.worker import code_cache
from tests.support.properties import SLOW

NAME = st.one_of(
    st.sampled_from([":", "C:", "-", "~", "...", "a.py", "A.PY", "é", "e\u0301", "\udce9", "\\", "\n"]),
    st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=8),
).filter(lambda name: name not in (".", ".."))
TREE = st.dictionaries(st.lists(NAME, min_size=1, max_size=3).map("/".join), st.binary(max_size=20), max_size=5)


def lay(folder: Path, tree: dict[str, bytes]) -> dict[str, bytes]:
    """Write the files, and return the files that exist at the end."""
    for name, content in tree.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue  # the path of another file conflicts with this one
    return found(folder)


def found(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@SLOW
@given(TREE)
def test_a_code_folder_arrives_whole_or_is_refused(tree: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as place:
        there = Path(place) / "there"
        there.mkdir()
        laid = lay(there, tree)
        odd = any("\\" in name or "\udce9" in name for name in laid)
        try:
            data = code_cache.pack(there)
        except UsageError:
            assert odd
            return
        assert not odd
        assert data == code_cache.pack(there)
        here = Path(place) / "here"
        code_cache.unpack(data, hashlib.sha256(data).hexdigest(), here)
        assert found(here) == laid
        assert {path.name for path in Path(place).iterdir()} == {"there", "here"}
