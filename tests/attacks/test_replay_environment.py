"""Attacks on the environment of a user who replays a task."""

from __future__ import annotations

import pytest

from batchlab.client.debug.foreground import task_environment, withheld

SECRETS = (
    "ANTHROPIC_AUTH",
    "ARTIFACTORY_PAT",
    "AZURE_STORAGE_CONNECTION_STRING",
    "BASIC_AUTH",
    "BORG_PASSPHRASE",
    "COOKIE",
    "DOCKER_AUTH_CONFIG",
    "ENCRYPTION_KEY",
    "GH_PAT",
    "GITHUB_PAT",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GPG_PASSPHRASE",
    "JWT",
    "KUBECONFIG",
    "MYSQL_PWD",
    "NETRC",
    "NPM_AUTH",
    "PGPASSFILE",
    "PIN",
    "REDIS_AUTH",
    "RESTIC_PASS",
    "SENTRY_DSN",
    "SESSION_ID",
    "SIGNING_KEY",
    "SLACK_WEBHOOK_URL",
    "SSH_KEY",
    "STRIPE_SK",
    "TLS_KEY",
    "VAULT_ADDR",
    "AWS_SESSION_TOKEN",
    "BATCHLAB_TOKEN",
    "OPENAI_API_KEY",
    "SSH_AUTH_SOCK",
)
ORDINARY = {
    "HOME": "/home/u",
    "LANG": "C.UTF-8",
    "LC_NUMERIC": "C",
    "OMP_NUM_THREADS": "2",
    "PATH": "/usr/bin",
    "PYTHONPATH": "/code",
    "SSL_CERT_FILE": "/etc/ssl/ca.pem",
    "TZ": "UTC",
}


def test_no_secret_of_the_user_reaches_a_task() -> None:
    """Before, 18 of 26 variables with secrets reached the code of a job."""
    environ = ORDINARY | dict.fromkeys(SECRETS, "the-secret")
    assert task_environment(environ) == ORDINARY
    assert withheld(environ) == sorted(SECRETS)


def test_a_password_in_an_address_reaches_no_task() -> None:
    """A variable with a harmless name may contain a password."""
    environ = ORDINARY | {"PYTHONPATH": "https://user:the-password@host/x"}
    assert withheld(environ) == ["PYTHONPATH"]


@pytest.mark.parametrize("name", SECRETS)
def test_only_the_user_gives_a_variable(name: str) -> None:
    """Only the user passes a variable to a task. The option `--env NAME` is the only way for a variable to reach the
    task."""
    environ = ORDINARY | dict.fromkeys(SECRETS, "the-secret")
    assert task_environment(environ, [name]) == ORDINARY | {name: "the-secret"}
