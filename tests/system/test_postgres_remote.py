"""A ledger on a PostgreSQL server of another machine, such as RDS, whose passwords change while the grid runs."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from batchlab.adapters.aws.endpoint import Endpoint, client
from batchlab.adapters.sql import IamLogins, Login, Logins, SecretLogins, SqlLedger, open_postgres
from batchlab.adapters.sql.logins import in_secret
from batchlab.core.errors import BackendError, NotFound, Unreachable
from batchlab.core.model import JobState
from batchlab.core.service_settings import ManagerSettings
from batchlab.manager.manager import Manager
from tests.support.contract.ledger_suite import JOB, bundle, counts_of, done, fold, submit
from tests.support.postgres import managers as grid
from tests.support.postgres.remote import Fixed, Remote, end_sessions_of, error_at, look, remote

__all__ = ["remote"]


class Secret:
    """A secret in Secrets Manager, and its role in the database."""

    def __init__(self, remote: Remote, endpoint: Endpoint, name: str) -> None:
        self.remote, self.endpoint, self.name = remote, endpoint, name
        self.passwords = [self._new()]
        self._manager = client(endpoint, "secretsmanager", connections=1)
        remote.role(name, self.passwords[0])
        with in_secret():
            self._manager.create_secret(Name=name, SecretString=self._text)

    def _new(self) -> str:
        return f"s3cret-{secrets.token_hex(8)}"

    @property
    def _text(self) -> str:
        return json.dumps({"username": self.name, "password": self.passwords[-1]})

    def change(self) -> None:
        """Change the password in the database, and end all sessions."""
        self.passwords.append(self._new())
        self.remote.password(self.name, self.passwords[-1])
        end_sessions_of(self.remote.server)

    def publish(self) -> None:
        """Store the new password in Secrets Manager."""
        with in_secret():
            self._manager.put_secret_value(SecretId=self.name, SecretString=self._text)

    def open(self) -> SqlLedger:
        logins = SecretLogins(self.endpoint, self.name)
        schema = self.name.replace("_", "-")
        return open_postgres(self.remote.url(), schema=schema, ca=self.remote.ca, logins=logins)

    def close(self) -> None:
        self._manager.close()
        schema = self.name.replace("_", "-")
        self.remote.server.execute(f'DROP SCHEMA IF EXISTS "{schema}" CASCADE')

    def check_untold(self, *told: str) -> None:
        for password in self.passwords:
            assert not any(password in text for text in told)


@pytest.fixture
def secret(remote: Remote, moto: Endpoint) -> Iterator[Secret]:
    made = Secret(remote, moto, f"rotated_{secrets.token_hex(4)}")
    yield made
    made.close()


def test_a_rotation_is_survived_call_by_call(secret: Secret, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def main() -> str:
        ledger = secret.open()
        await submit(ledger)
        for n in range(3):
            secret.change()
            with pytest.raises(Unreachable, match="is being changed") as caught:
                await ledger.job(JOB.id)
            secret.publish()
            assert await fold(ledger, done(bundle(n, n + 1))) == [True]
        assert (await counts_of(ledger)).succeeded == 3
        await ledger.close()
        return "".join(traceback.format_exception(caught.value))

    told = asyncio.run(main())
    assert "psycopg" in told
    secret.check_untold(told, caplog.text)
    assert "botocore" in caplog.text, "there was something to keep quiet of"


def test_sessions_outlive_a_rotation_that_ends_none(secret: Secret) -> None:
    async def main() -> None:
        ledger = secret.open()
        await submit(ledger)
        secret.passwords.append("s3cret-other")
        secret.remote.password(secret.name, "s3cret-other")
        assert (await ledger.job(JOB.id)).job == JOB
        await ledger.close()

    asyncio.run(main())


def test_a_secret_is_fetched_once_until_it_is_refused(secret: Secret) -> None:
    logins = SecretLogins(secret.endpoint, secret.name)
    first = logins.login()
    secret.passwords.append("s3cret-next")
    secret.publish()
    assert logins.login() is first
    second = logins.login(refused=first)
    assert second.password == "s3cret-next"
    assert logins.login(refused=first) is second, "somebody else has fetched it"
    assert "s3cret" not in repr((first, second, logins))


def test_wrong_login_is_reported_at_once(secret: Secret) -> None:
    secret.change()

    async def main() -> BackendError:
        ledger = secret.open()
        with pytest.raises(BackendError) as caught:
            await ledger.jobs()
        await ledger.close()
        return caught.value

    error = asyncio.run(main())
    assert not isinstance(error, Unreachable)
    assert f"refuses the password of the secret {secret.name}" in str(error)
    secret.check_untold("".join(traceback.format_exception(error)))


@pytest.mark.parametrize("text", ["", "pa55word", '["pa55word"]', '{"username": "u"}', "{"])
def test_secret_without_a_login_is_reported_without_its_content(text: str, moto: Endpoint, remote: Remote) -> None:
    name, manager = f"broken-{secrets.token_hex(4)}", client(moto, "secretsmanager", connections=1)
    if text:
        manager.create_secret(Name=name, SecretString=text)
    else:
        manager.create_secret(Name=name, SecretBinary=b"pa55word")
    manager.close()
    error = error_at(remote.url(), ca=remote.ca, logins=SecretLogins(moto, name))
    assert f"The secret {name} does not contain a login" in str(error)
    assert "pa55word" not in "".join(traceback.format_exception(error))


def test_missing_secret_is_reported(moto: Endpoint, remote: Remote) -> None:
    error = error_at(remote.url(), ca=remote.ca, logins=SecretLogins(moto, "nowhere"))
    assert not isinstance(error, NotFound | Unreachable)
    assert "The secret nowhere" in str(error)


def test_the_manager_leads_on_through_a_rotation(
    secret: Secret, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The password changes in the middle of a job. All sessions end, and the secret is updated later."""
    caplog.set_level(logging.DEBUG)
    settings = ManagerSettings(lease_ttl_s=30.0, tick_s=0.2, silence_s=6.0, visibility_s=3.0, wait_s=0.5)

    async def succeeded(ledger: SqlLedger, at_least: int) -> None:
        async with asyncio.timeout(60):
            while True:
                try:
                    if (await ledger.rows(grid.JOB.id)).stages[0].counts.succeeded >= at_least:
                        return
                except (NotFound, Unreachable):
                    pass
                await asyncio.sleep(0.05)

    async def main() -> None:
        ledger = secret.open()
        async with grid.ports_in(tmp_path, ledger) as ports:
            manager = Manager(ports, settings, [grid.POOL], "only")
            leading = asyncio.create_task(manager.run())
            await asyncio.wait_for(manager.is_leader.wait(), 30)
            await manager.job_commands.submit(grid.JOB, grid.ITEMS)
            async with grid.workers(ports, 2):
                for share in (50, 150):
                    await succeeded(ledger, share)
                    await asyncio.to_thread(secret.change)
                    await asyncio.sleep(1.0)
                    assert not leading.done()
                    await asyncio.to_thread(secret.publish)
                async with asyncio.timeout(60):
                    while not (await ledger.job(grid.JOB.id)).state.ended:
                        await asyncio.sleep(0.1)
            assert not leading.done()
            assert (await ledger.job(grid.JOB.id)).state is JobState.SUCCEEDED
            counts = (await ledger.rows(grid.JOB.id)).stages[0].counts
            assert counts.planned == counts.succeeded == len(grid.ITEMS)
            leading.cancel()
            with suppress(asyncio.CancelledError):
                await leading
        await ledger.close()

    asyncio.run(main())
    secret.check_untold(caplog.text)


# --- Tokens of IAM -------------------------------------------------------------------------------


class Checked:
    """Tokens that the database accepts, each for one connection. Like RDS, the database accepts only the newest
    token."""

    where = "IAM"

    def __init__(self, tokens: Logins, remote: Remote) -> None:
        self._tokens, self._remote = tokens, remote
        self.made: list[str] = []

    def login(self, *, refused: Login | None = None) -> Login:
        login = self._tokens.login(refused=refused)
        self._remote.password(login.user, login.password)
        self.made.append(login.password)
        return login


def test_each_connection_brings_a_token_of_its_own(remote: Remote, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    remote.role("by_token", "nothing")
    # The token is signed locally with the keys of this endpoint, without a request.
    here = Endpoint("http://127.0.0.1:1", region="eu-central-1")
    host, port = "localhost", remote.server.port
    tokens = Checked(IamLogins(here, host=host, port=port, user="by_token"), remote)

    async def main() -> None:
        ledger = open_postgres(remote.url(), schema="tokens", ca=remote.ca, logins=tokens)
        await submit(ledger)
        first = tokens.made[-1]
        await asyncio.sleep(1.1)  # a token contains the second of its signature
        end_sessions_of(remote.server)
        assert await fold(ledger, done(bundle(0, 1))) == [True]
        assert tokens.made[-1] != first
        await ledger.close()
        with pytest.raises(BackendError, match="refuses the password of the test") as caught:
            await look(open_postgres(remote.url(), ca=remote.ca, logins=Fixed("by_token", first)))
        assert first not in "".join(traceback.format_exception(caught.value))

    asyncio.run(main())
    remote.server.execute("DROP SCHEMA tokens CASCADE")
    for token in tokens.made:
        assert token.startswith(f"{host}:{port}/?Action=connect&DBUser=by_token&")
        assert "X-Amz-Expires=900" in token
        assert "eu-central-1%2Frds-db%2Faws4_request" in token
        signature = token.partition("X-Amz-Signature=")[2][:64]
        assert len(signature) == 64
        assert signature not in caplog.text
