"""Analytics store of a stack: RDS, SimpleDB, or a file on the manager's disk.

Invariant: every connection to a database is encrypted, and its certificate is checked.
"""

from __future__ import annotations

from pathlib import Path

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.core.ports import Ledger
from batchlab.runtime.aws.deployment import AwsDeployment, Database


def open_ledger(at: AwsDeployment, file: Path) -> Ledger:
    """Return the stack's ledger. It connects at the first call.

    `file` is the path of the ledger if the stack stores it in a file.
    """
    if at.database:
        return _postgres(at.database, Endpoint(region=at.region))
    if at.domain:
        from batchlab.adapters.simpledb import open_simpledb

        return open_simpledb(Endpoint(region=at.region), at.domain)
    from batchlab.adapters.sql import open_sqlite

    return open_sqlite(file)


def _postgres(at: Database, aws: Endpoint) -> Ledger:
    from batchlab.adapters.sql import IamLogins, SecretLogins, open_postgres

    return open_postgres(
        f"postgresql://{at.host}:{at.port}/{at.name}",
        ca=Path(at.ca) if at.ca else None,
        logins=IamLogins(aws, host=at.host, port=at.port, user=at.user)
        if at.iam
        else SecretLogins(aws, at.secret),
    )
