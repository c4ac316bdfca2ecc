"""Access to the page: single-use codes, and signed cookies that expire."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchlab.adapters.local.state_files import StateFile
from batchlab.server.http.authentication import CODE_S, MAX_CODES, SESSION_S, Sessions
from tests.support.fleet import ManualClock

TOKEN = "the grid's token"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def sessions(clock: ManualClock) -> Sessions:
    return Sessions(TOKEN, clock)


def test_a_code_opens_once_and_for_a_minute(sessions: Sessions, clock: ManualClock) -> None:
    first, second = sessions.new_code(), sessions.new_code()
    assert first != second
    assert sessions.sign_in(first) == ""
    assert sessions.sign_in(first) is None
    clock.time_s += CODE_S + 0.1
    assert sessions.sign_in(second) is None


def test_the_token_opens_and_nothing_like_it(sessions: Sessions) -> None:
    assert sessions.sign_in(TOKEN) == ""
    for wrong in ("", TOKEN[:-1], TOKEN + " ", "ü", "\ud800"):
        assert sessions.sign_in(wrong) is None


def test_only_so_many_codes_wait(sessions: Sessions) -> None:
    codes = [sessions.new_code() for _ in range(MAX_CODES + 1)]
    assert sessions.sign_in(codes[0]) is None
    assert sessions.sign_in(codes[1]) == ""


def test_a_session_ends_at_its_time(sessions: Sessions, clock: ManualClock) -> None:
    session, cookie = sessions.start()
    place = sessions.place(session)
    assert sessions.find(cookie, place) == session
    clock.time_s += SESSION_S - 2
    assert sessions.find(cookie, place) == session
    clock.time_s += 2
    assert sessions.find(cookie, place) is None


def test_changed_cookie_is_refused(sessions: Sessions) -> None:
    session, cookie = sessions.start()
    until, name, mark = cookie.split(".")
    later = f"{int(until) + 1}.{name}.{mark}"
    for wrong in (
        "",
        ".",
        "..",
        "x",
        later,
        f"{until}.{name}x.{mark}",
        f"{until}.{name}.",
        f"{until}.{name}",
        f"{until}.{name}.{sessions.form_token(session)}",
        "9" * 30 + f".{name}.{mark}",
        "²." + name,
    ):
        assert sessions.find(wrong, sessions.place(session)) is None, wrong


def test_cookie_is_valid_only_for_its_grid_and_token(clock: ManualClock) -> None:
    mine, other = Sessions(TOKEN, clock), Sessions("another", clock)
    session, cookie = mine.start()
    place = mine.place(session)
    assert other.find(cookie, place) is None
    assert other.find(cookie, other.place(session)) is None
    assert mine.cookie(place) != other.cookie(place)
    assert not other.is_form_token(session, mine.form_token(session))


def test_restarted_manager_remembers_sessions_and_logouts(clock: ManualClock, tmp_path: Path) -> None:
    kept = StateFile(tmp_path / "sessions.json")
    before = Sessions(TOKEN, clock, kept)
    session, cookie = before.start()
    gone, left = before.start()
    before.close(gone)
    again = Sessions(TOKEN, clock, kept)
    assert again.find(cookie, before.place(session)) == session
    assert again.find(left, before.place(gone)) is None
    assert again.cookie("x") == before.cookie("x")
    assert TOKEN not in (tmp_path / "sessions.json").read_text()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"seed": "x"}', b'{"seed":"x","closed":[]}'])
def test_losing_the_list_of_logouts_ends_all_sessions(clock: ManualClock, tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "sessions.json"
    before = Sessions(TOKEN, clock, StateFile(file))
    begun = [before.start(), before.start()]
    cookies = [(cookie, before.place(session)) for session, cookie in begun]
    before.close(before.start()[0])
    file.write_bytes(damage)
    for again in (Sessions(TOKEN, clock, StateFile(file)), Sessions(TOKEN, clock)):
        assert [again.find(*cooky) for cooky in cookies] == [None, None]
        assert again.start()[1]


def test_list_of_logouts_is_bounded(clock: ManualClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("batchlab.server.http.authentication.MAX_CLOSED", 3)
    sessions = Sessions(TOKEN, clock, StateFile(tmp_path / "sessions.json"))
    every = [sessions.start() for _ in range(5)]
    for session, _ in every[:4]:
        sessions.close(session)
    assert sessions._closed == {}
    assert [sessions.find(cookie, sessions.place(one)) for one, cookie in every] == [None] * 5
    session, cookie = sessions.start()
    assert sessions.find(cookie, sessions.place(session)) == session


def test_full_disk_does_not_prevent_a_login(
    clock: ManualClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    sessions = Sessions(TOKEN, clock, StateFile(tmp_path / "file" / "sessions.json"))
    session, cookie = sessions.start()
    sessions.close(session)
    assert sessions.find(cookie, sessions.place(session)) is None
    assert "closed sessions of the web page cannot be stored" in caplog.text


def test_logout_deletes_the_cookie(sessions: Sessions, clock: ManualClock) -> None:
    session, cookie = sessions.start()
    other, kept = sessions.start()
    sessions.close(session)
    assert sessions.find(cookie, sessions.place(session)) is None
    assert sessions.find(kept, sessions.place(other)) == other
    clock.time_s += SESSION_S
    sessions.close(other)
    assert session.name not in sessions._closed  # an expired session is not remembered


def test_a_forms_token_is_of_one_session(sessions: Sessions) -> None:
    one, other = sessions.start()[0], sessions.start()[0]
    assert sessions.is_form_token(one, sessions.form_token(one))
    assert not sessions.is_form_token(one, sessions.form_token(other))
    assert not sessions.is_form_token(one, "")


def test_the_token_is_in_no_cookie(sessions: Sessions) -> None:
    session, cookie = sessions.start()
    place = sessions.place(session)
    assert TOKEN not in cookie + place + sessions.cookie(place) + sessions.form_token(session)


def test_a_cookie_without_its_place_opens_nothing(sessions: Sessions) -> None:
    """A browser sends a cookie to every port of a host, but does not send the session's path."""
    session, cookie = sessions.start()
    other = sessions.start()[0]
    place = sessions.place(session)
    assert place != sessions.place(other)
    for wrong in ("", place[:-1], place + "0", "0" * 32, sessions.place(other)):
        assert sessions.find(cookie, wrong) is None
