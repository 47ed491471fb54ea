"""Where clients dial."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from retinue.client import address
from retinue.client.channel import ConfigurationError, Connection, Token

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETINUE_ADDRESS", "RETINUE_WORKQUEUE_ADDRESS", "RETINUE_CONTROL_ADDRESS", "RETINUE_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_the_patterns_own_address_wins_over_the_common_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address.app_address("workqueue") == "127.0.0.1:7070"
    monkeypatch.setenv("RETINUE_ADDRESS", "127.0.0.1:1")
    assert address.app_address("workqueue") == "127.0.0.1:1"
    monkeypatch.setenv("RETINUE_WORKQUEUE_ADDRESS", "/run/retinue/workqueue.sock")
    assert address.app_address("workqueue") == "unix:/run/retinue/workqueue.sock"
    assert address.app_address("adapter") == "127.0.0.1:1"


def test_the_control_socket_is_found_in_a_directory_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".retinue").mkdir()
    (tmp_path / "deep/er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep/er")
    (tmp_path / ".retinue/control.sock").touch()
    assert address.control_address() is None, "a plain file is not a socket"
    (tmp_path / ".retinue/control.sock").unlink()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / ".retinue/control.sock"))
        assert address.control_address() == f"unix:{tmp_path}/.retinue/control.sock"
        monkeypatch.setenv("RETINUE_CONTROL_ADDRESS", "unix:/elsewhere")
        assert address.control_address() == "unix:/elsewhere"


def test_the_environment_names_an_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINUE_UPSTREAM_DB_EU_ADDRESS", "127.0.0.1:5432")
    assert address.upstream_address("db-eu") == "127.0.0.1:5432"
    assert address.upstream_address("db") is None


@pytest.mark.parametrize(
    ("where", "local"),
    [
        ("127.0.0.1:7070", True),
        ("[::1]:7070", True),
        ("localhost:7070", True),
        ("unix:/x", True),
        ("10.0.0.1:7070", False),
        ("queue.example:7076", False),
        ("dns:///queue.example:7076", False),
    ],
)
def test_what_stays_on_this_machine(where: str, local: bool) -> None:  # noqa: FBT001 - a row of the table
    assert address.is_local(where) is local


def test_a_token_is_never_sent_in_plaintext_off_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv("RETINUE_TOKEN_FILE", str(tmp_path / "token"))
    assert ("authorization", "Bearer secret") in Connection("127.0.0.1:1").metadata()
    with pytest.raises(ConfigurationError, match="RETINUE_TLS_CA_FILE"):
        Connection("queue.example:7076")


def test_a_rotated_token_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("first")
    token = Token(str(tmp_path / "token"))
    assert token.metadata() == (("authorization", "Bearer first"),)
    (tmp_path / "new").write_text("second")
    (tmp_path / "new").rename(tmp_path / "token")
    assert token.metadata() == (("authorization", "Bearer second"),)


def test_a_token_file_that_is_missing_says_which(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="RETINUE_TOKEN_FILE"):
        Token(str(tmp_path / "none")).metadata()
