"""Connections to the secrets, the manager, and the ledger of a stack on AWS.

Invariants: a client reaches the manager through Session Manager, so the manager's instance does not open any port.
Every connection to a database is encrypted, and the client checks the certificate of the database.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

from batchlab.adapters.aws.endpoint import Endpoint, client, translate_errors
from batchlab.core.errors import BackendError, Unreachable, UsageError
from batchlab.core.ports import Ledger
from batchlab.runtime.aws_deployment import MANAGER_PORT, AwsDeployment, Database

PLUGIN = "session-manager-plugin"
"""Name of AWS's program that forwards a session of Session Manager to a local port.

The AWS CLI also runs the program session-manager-plugin.
"""
_GRANTED = "AWS_SSM_START_SESSION_RESPONSE"
"""Name of the environment variable that contains the token of a session.

The program session-manager-plugin reads the token from the environment variable that its first argument names.
"""
_DOCUMENT = "AWS-StartPortForwardingSession"


def secret_text(region: str, secret: str) -> str:
    """Return the text of the secret with the ARN `secret`. Raise BackendError if AWS refuses the request."""
    manager = client(Endpoint(region=region), "secretsmanager", connections=1)
    with closing(manager), translate_errors(f"Secret {secret!r}"):
        return str(manager.get_secret_value(SecretId=secret)["SecretString"])


def manager_instance(at: AwsDeployment) -> str:
    """Return the id of the manager's EC2 instance. Raise Unreachable while the instance is not InService."""
    scaling = client(Endpoint(region=at.region), "autoscaling", connections=1)
    with closing(scaling), translate_errors(f"Auto Scaling group {at.manager_group!r}"):
        groups = scaling.describe_auto_scaling_groups(AutoScalingGroupNames=[at.manager_group])["AutoScalingGroups"]
    if not groups:
        raise BackendError(
            f"The stack {at.stack!r} has no Auto Scaling group {at.manager_group!r}.",
            remedy="`batchlab deploy status` lists the parts of the stack.",
        )
    for instance in groups[0].get("Instances", ()):
        if instance["LifecycleState"] == "InService":
            return instance["InstanceId"]
    raise Unreachable(
        f"The manager does not run: no instance of {at.manager_group!r} is InService.",
        remedy="An instance may be starting. `batchlab deploy status` shows its state.",
    )


def find_plugin() -> str:
    """Return the path of AWS's Session Manager plugin.

    Raise UsageError if the Session Manager plugin is not installed.
    """
    if path := shutil.which(PLUGIN):
        return path
    raise UsageError(
        f"The program {PLUGIN} is not installed. It forwards connections to the manager on AWS.",
        remedy="Install AWS's Session Manager plugin. If the manager can be reached without it, set "
        "BATCHLAB_MANAGER_URL to the manager's URL.",
    )


def open_session(at: AwsDeployment, instance: str, port: int, log: Path) -> subprocess.Popen[bytes]:
    """Start a process that listens on `port` of 127.0.0.1 and forwards connections to the manager.

    The forwarding process writes its output to `log`. Raise BackendError if AWS refuses the session.
    """
    plugin = find_plugin()
    wanted: dict[str, Any] = {
        "Target": instance,
        "DocumentName": _DOCUMENT,
        "Parameters": {"portNumber": [str(MANAGER_PORT)], "localPortNumber": [str(port)]},
    }
    ssm = client(Endpoint(region=at.region), "ssm", connections=1)
    with closing(ssm), translate_errors(f"Session on {instance}"):
        session = ssm.start_session(**wanted)
        url = ssm.meta.endpoint_url
    granted = {key: session[key] for key in ("SessionId", "TokenValue", "StreamUrl")}
    # The session's token is passed in the environment, because every user can read a command line.
    argv = [plugin, _GRANTED, at.region, "StartSession", "", json.dumps(wanted), url]
    env = {**os.environ, _GRANTED: json.dumps(granted)}
    with log.open("ab") as output:
        return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def open_ledger(at: AwsDeployment, file: Path) -> Ledger:
    """Return the ledger of the stack. The ledger connects at the first call.

    `file` is the path of the ledger if the stack stores the ledger in a file.
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
        logins=IamLogins(aws, host=at.host, port=at.port, user=at.user) if at.iam else SecretLogins(aws, at.secret),
    )
