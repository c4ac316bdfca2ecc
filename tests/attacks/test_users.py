"""Attacks with the tokens of users: forged names and serials, replayed signatures, and a changed list of users."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from batchlab.core import http_connections, users
from batchlab.core.errors import Malformed, TooNew
from batchlab.core.http_connections import SCHEME
from batchlab.core.protocol import json_format, object_keys
from batchlab.manager.user_directory import UserDirectory
from batchlab.server.http.authentication import MAX_BYTES
from tests.support.server.api import TOKEN, Rig, job
from tests.support.server.page import Visitor
from tests.support.server.users import add, request

PATH = "/v1/jobs"


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as made:
        yield made


def status(rig: Rig, authorization: str, method: str = "GET", path: str = PATH) -> int:
    return rig.http.request(method, path, headers={"Authorization": authorization}).status_code


def test_changed_tokens_are_refused(rig: Rig) -> None:
    """A user can change neither the name, nor the serial, nor the secret in a token."""
    token, other = add(rig, "vera", "view"), add(rig, "ada", "administer")
    scheme, name, serial, secret = token.split(".")
    assert status(rig, f"Bearer {token}") == 200
    for changed in (
        f"{scheme}.ada.{serial}.{secret}",
        f"{scheme}.ada.{other.split('.')[2]}.{secret}",
        f"{scheme}.owner.{serial}.{secret}",
        f"{scheme}.{name}.{'0' * 16}.{secret}",
        f"{scheme}.{name}.{serial}.{'0' * 64}",
        f"{scheme}.{name}.{serial}.{secret[:-1]}",
        f"{scheme}.{name}.{serial}",
        secret,
        f"{token}.",
        token.upper(),
    ):
        assert status(rig, f"Bearer {changed}") == 401, changed
        visitor = Visitor(rig)
        with visitor.http:
            assert visitor.log_in(changed).status_code == 403


def test_the_token_of_a_user_is_not_the_grids_token(rig: Rig) -> None:
    """A signature with a user's token counts only for this user. One with the grid's token does not name a user."""
    token, grids = add(rig, "vera", "view"), http_connections.sign(TOKEN, "POST", "/v1/shutdown", b"")
    own = http_connections.sign(token, "POST", "/v1/shutdown", b"")
    assert status(rig, own.header, "POST", "/v1/shutdown") == 403
    for header in (
        f"{SCHEME} {own.at_s}.{own.nonce}.{own.body}.{own.mac}",
        f"{SCHEME} {own.at_s}.{own.nonce}.{own.body}.{own.mac}.owner.{'0' * 16}",
        f"{grids.header}.{users.key_name_in(token)}",
        f"{own.header}.{own.key}",
    ):
        assert status(rig, header, "POST", "/v1/shutdown") == 401, header
    assert rig.shutdowns == 0


def test_a_signature_of_a_user_counts_once(rig: Rig) -> None:
    signed = http_connections.sign(add(rig, "vera", "view"), "GET", PATH, b"")
    assert status(rig, signed.header) == 200
    assert status(rig, signed.header) == 401
    for method, path in (("GET", "/v1/use"), ("POST", PATH)):
        assert status(rig, http_connections.sign(TOKEN, "GET", PATH, b"").header, method, path) == 401


def test_a_user_who_may_only_view_sends_no_body(rig: Rig) -> None:
    """The manager answers before it has read the body, so such a user cannot fill the manager's memory."""
    token = add(rig, "vera", "view")
    answer = request(rig, token, "POST", PATH, content=b"x" * (MAX_BYTES + 1))
    assert answer.status_code == 403


def test_a_writer_of_the_bucket_cannot_change_a_role(rig: Rig) -> None:
    """The list of users needs a seal of the grid's token. With a wrong seal, only the grid's token is valid."""
    token = add(rig, "vera", "view")
    stored = rig.run(rig.objects.get(object_keys.USERS))
    assert token.split(".")[-1].encode() not in stored
    forged = json.loads(stored)
    forged["users"][-1]["role"] = "administer"
    rig.run(rig.objects.put(object_keys.USERS, json.dumps(forged).encode()))
    directory = UserDirectory(rig.manager.ports, TOKEN)
    assert rig.run(directory.find(users.key_name_in(token))) is None
    with pytest.raises(Malformed, match="the seal does not belong to the grid's token"):
        rig.run(directory.all())
    rig.run(rig.objects.put(object_keys.USERS, stored))
    assert rig.run(UserDirectory(rig.manager.ports, TOKEN).find(users.key_name_in(token)))
    assert rig.run(UserDirectory(rig.manager.ports, "another token").find(users.key_name_in(token))) is None


def test_a_new_token_of_the_grid_begins_a_new_list(rig: Rig) -> None:
    add(rig, "vera", "view")
    stored = rig.run(rig.objects.get(object_keys.USERS))
    changed = UserDirectory(rig.manager.ports, "another token")
    rig.run(changed.add("bob", users.Role.VIEW, by="owner"))
    assert [user.name for user in rig.run(changed.all())] == ["bob"]
    later = json.dumps({**json.loads(stored), "v": 99}).encode()
    rig.run(rig.objects.put(object_keys.USERS, later))
    with pytest.raises(Exception, match="format 99"):  # A later release may have written these users.
        rig.run(changed.add("eve", users.Role.VIEW, by="owner"))
    assert rig.run(rig.objects.get(object_keys.USERS)) == later
    rig.run(rig.objects.put(object_keys.USERS, stored))


def test_sessions_and_codes_belong_to_their_user(rig: Rig) -> None:
    """A session of a user cannot become a session of the owner, and a code opens the page for the user that asked."""
    token = add(rig, "vera", "view")
    code = request(rig, token, "POST", "/v1/sessions").json()["code"]
    visitor = Visitor(rig)
    with visitor.http:
        assert visitor.log_in(code).status_code == 303
        assert visitor.get("/grid/drain").status_code == 403
        assert visitor.get("/").status_code == 200
        ((name, value),) = visitor.http.cookies.items()
        until, session, key, serial, signature = value.split(".")
        for changed in (f"{until}.{session}.{signature}", f"{until}.{session}.ada.{serial}.{signature}"):
            visitor.http.cookies.clear()
            visitor.http.cookies.set(name, changed, path=visitor.root)
            assert visitor.get("/").status_code == 303, changed
        assert key == "vera"


def test_an_owner_in_a_definition_must_be_a_user_name() -> None:
    doc = json_format.job_to_json(job())
    for owner in ("../../x", "owner", "", 7):
        stored = json.dumps({**doc, "owner": owner}).encode()
        if owner == "":
            assert json_format.job_from_json(json_format.loads(stored)).owner == ""
        else:
            with pytest.raises(TooNew):
                json_format.job_from_json(json_format.loads(stored))
