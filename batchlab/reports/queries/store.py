"""SQL access to folders of Parquet files, with one view for each table, and the named queries.

Invariants: a query can only read the opened files. A query cannot reach other files or the network, load extensions,
change settings, or write (see `check_query`). The text of a named query in `queries.sql` runs unchanged.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from batchlab.core.errors import UsageError
from batchlab.reports.tables.schema import JOBS, TABLES, VERSION, Table

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
"""Allowed node types of a parsed query. Nodes of other types can write, even within a WITH clause."""
_TABLE_FUNCTIONS = {"unnest", "range", "generate_series", "json_each", "json_tree", "repeat"}
"""Allowed table functions. Other table functions read files or run text as SQL."""


def runs_in(folder: Path) -> list[Path]:
    """Return the folder if the folder contains a run, or else its subfolders with a run. Raise UsageError if no run is
    found.
    """
    if (folder / JOBS.file).is_file():
        return [folder]
    paths = sorted(path.parent for path in folder.glob(f"*/{JOBS.file}")) if folder.is_dir() else []
    if not paths:
        raise UsageError(
            f"{folder} holds no job performance data.",
            remedy="`batchlab report pull JOB` downloads the data of a job into a folder of that name. If a folder has "
            "the name of the job, use the full id of the job.",
        )
    return paths


def open_store(folders: Sequence[Path]) -> DuckDBPyConnection:
    """Return a DuckDB connection with one view for each table of the schema, over all runs in `folders`.

    A table that an older version of batchlab did not write is empty. A column that an older version did not write is
    NULL. Raise UsageError for a folder without data, for data of a newer version, and for a job that occurs twice.
    """
    import duckdb

    runs = [run for folder in folders for run in runs_in(folder)]
    connection = duckdb.connect(":memory:")
    try:
        connection.execute("SET python_enable_replacements = false")
        # Without this setting, DuckDB writes data that exceeds the memory to a folder, which a query could then use for
        # writing.
        connection.execute("SET temp_directory = ''")
        connection.execute("SET autoinstall_known_extensions = false")
        connection.execute("SET autoload_known_extensions = false")
        for table in TABLES:
            paths = [str(run / table.file) for run in runs if (run / table.file).is_file()]
            connection.execute(_view(connection, table, paths))
        _check(connection, runs)
        _lock(connection, [str(run / table.file) for run in runs for table in TABLES])
    except duckdb.Error as error:
        connection.close()
        raise UsageError(
            f"The job performance data cannot be read: {_sentence(error)}",
            remedy="`batchlab report write JOB` writes it again, and `batchlab report pull JOB` downloads it again.",
        ) from error
    except UsageError:
        connection.close()
        raise
    return connection


def _view(connection: DuckDBPyConnection, table: Table, paths: Sequence[str]) -> str:
    if not paths:
        columns = ", ".join(f'NULL::{c.type} AS "{c.name}"' for c in table.columns)
        return f'CREATE VIEW "{table.name}" AS SELECT {columns} WHERE false'
    files = f"[{', '.join(_quote(path) for path in paths)}]"
    # Files of older versions lack newer columns, so the following query lists the columns that exist.
    rows = connection.execute(
        f"SELECT name, count(*) FROM parquet_schema({files}) GROUP BY name"  # noqa: S608 - paths
    ).fetchall()
    existing = {str(name): int(files) for name, files in rows}
    columns = ", ".join(
        f'"{c.name}"::{c.type} AS "{c.name}"' if c.name in existing else f'NULL::{c.type} AS "{c.name}"'
        for c in table.columns
    )
    by_name = ", union_by_name = true" if len(paths) > 1 else ""
    return (
        f'CREATE VIEW "{table.name}" AS '  # noqa: S608 - names of the schema, quoted paths
        f"SELECT {columns} FROM read_parquet({files}{by_name})"
    )


def _check(connection: DuckDBPyConnection, runs: Sequence[Path]) -> None:
    rows = connection.execute("SELECT job, schema_version FROM jobs").fetchall()
    newer = [job for job, version in rows if version > VERSION]
    if newer:
        raise UsageError(
            f"A newer version of batchlab wrote the data of job {newer[0]}.",
            remedy="Read it with that version of batchlab, or with a later one.",
        )
    jobs = [job for job, _ in rows]
    twice = next((job for job in jobs if jobs.count(job) > 1), None)
    if twice is not None:
        named = ", ".join(str(run) for run in runs)
        raise UsageError(f"Job {twice} occurs more than once in {named}.", remedy="Name each run once.")


def _lock(connection: DuckDBPyConnection, paths: Sequence[str]) -> None:
    allowed = ", ".join(_quote(path) for path in paths)
    connection.execute(f"SET allowed_paths = [{allowed}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _sentence(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def rows(connection: DuckDBPyConnection, sql: str, parameters: object = None) -> list[dict[str, Any]]:
    """Run one of batchlab's own queries, and return each row as a mapping from column names to values."""
    result = connection.execute(sql, parameters)
    names = [str(column[0]) for column in result.description or ()]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


# --- User queries --------------------------------------------------------------------------------


def run_query(
    connection: DuckDBPyConnection, sql: str, parameters: Sequence[object] | None = None
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Run a user's query and return its column names and rows.

    Raise UsageError with DuckDB's message if the query is invalid. Raise UsageError if the query does more than read.
    """
    import duckdb

    try:
        check_query(connection, sql)
        result = connection.execute(sql, parameters)
        names = [str(column[0]) for column in result.description or ()]
        return names, result.fetchall()
    except duckdb.Error as error:
        raise UsageError(
            f"The query fails: {str(error).strip()}",
            remedy="`batchlab report query` lists example queries, and docs/report-data.md describes the tables.",
        ) from error


def check_query(connection: DuckDBPyConnection, sql: str) -> None:
    """Raise UsageError unless `sql` is one query that only reads the views.

    DuckDB accepts COPY and INSERT within a WITH clause, and COPY and INSERT could overwrite the opened files. The
    function therefore inspects the parsed query and accepts only types of nodes that are known to read.
    """
    from duckdb import StatementType

    statements = connection.extract_statements(sql)
    kinds = [statement.type for statement in statements]
    if kinds != [StatementType.SELECT]:
        raise _refusal("is not one SELECT")
    row = connection.execute("SELECT json_serialize_sql(?)", [statements[0].query]).fetchone()
    tree = json.loads(cast(tuple[str], row)[0])
    if tree.get("error"):
        raise _refusal(f"cannot be checked ({tree.get('error_message', 'no reason given')})")
    for node in _nodes(tree):
        kind = node.get("type")
        if isinstance(kind, str) and kind.endswith("_NODE") and kind not in _NODES:
            raise _refusal("does not only read")
        if kind == "TABLE_FUNCTION":
            name = str(node.get("function", {}).get("function_name", "")).lower()
            if name not in _TABLE_FUNCTIONS:
                raise _refusal(f"calls {name or 'a function'} instead of reading a table")


def _refusal(why: str) -> UsageError:
    return UsageError(
        f"The query {why}. A query may only read the tables of the runs.",
        remedy="Write one SELECT over the tables in docs/report-data.md.",
    )


def _nodes(tree: object) -> Iterator[dict[str, Any]]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


FILE = Path(__file__).with_name("queries.sql")
_NAME = re.compile(r"^-- name: (\w+)\n((?:-- .*\n)*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Query:
    """Named query. `meaning` describes the query's answer in one or two sentences."""

    name: str
    meaning: str
    sql: str


@cache
def named_queries() -> Mapping[str, Query]:
    """Return all named queries, in the order of the file `queries.sql`."""
    text = FILE.read_text()
    meanings = {head[1]: head[2].replace("\n-- ", " ").removeprefix("-- ").strip() for head in _NAME.finditer(text)}
    return {name: Query(name, meanings[name], sql) for name, sql in sections(text).items()}


def sections(text: str) -> dict[str, str]:
    """Return the statements of an SQL file by name. A line `-- name:` precedes each statement."""
    heads = list(_NAME.finditer(text))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    return {head[1]: text[head.end() : end].strip().removesuffix(";") for head, end in zip(heads, ends, strict=True)}


def find_query(name: str) -> Query:
    """Return the query with the name `name`. Raise UsageError if the query does not exist."""
    if query := named_queries().get(name):
        return query
    near = difflib.get_close_matches(name, named_queries(), n=2)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(f"The query {name!r} does not exist.", remedy=f"{hint}`batchlab report query` lists the queries.")
