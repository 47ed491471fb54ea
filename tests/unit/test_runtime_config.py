"""Claims about settings: where they come from, which wins, and what is said of wrong ones."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from retinue_server import command
from retinue_server.runtime import config
from retinue_server.runtime.config import ConfigError


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    days: int = 7


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    engine: str = "sqlite"
    retention: Retention = Retention()


def load(
    file: Path | None = None, environment: dict[str, str] | None = None, **flags: Any
) -> tuple[config.Settings, Queue]:
    settings, sections = config.load(
        Namespace(config=file and str(file), **flags),
        environment or {},
        {"workqueue": Queue},
        frozenset({"leaderelection"}),
    )
    queue = sections["workqueue"]
    assert isinstance(queue, Queue)
    return settings, queue


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "retinue.yaml"
    path.write_text(
        "listen: ['127.0.0.1:1']\n"
        "drain_seconds: 3\n"
        "limits: {max_concurrent_calls: 5, max_concurrent_streams: 6}\n"
        "workqueue: {engine: postgres, retention: {days: 1}}\n"
        "leaderelection: {anything: goes}\n"
    )
    return path


def test_flags_win_over_the_environment_and_that_over_the_file(file: Path) -> None:
    environment = {
        "RETINUE_DRAIN_SECONDS": "4",
        "RETINUE_LIMITS__MAX_CONCURRENT_CALLS": "50",
        "RETINUE_WORKQUEUE__RETENTION__DAYS": "2",
        "RETINUE_DATA_DIR": "/env",
    }
    settings, queue = load(file, environment, data_dir="/flag")
    assert settings.listen == ("127.0.0.1:1",)
    assert settings.drain_seconds == 4.0
    assert settings.limits.max_concurrent_calls == 50
    assert settings.limits.max_concurrent_streams == 6
    assert settings.data_dir == Path("/flag")
    assert queue == Queue(engine="postgres", retention=Retention(days=2))


def test_nothing_set_gives_the_defaults() -> None:
    settings, queue = load()
    assert settings == config.Settings()
    assert queue == Queue()
    assert settings.limits.max_concurrent_calls == 1024
    assert settings.limits.max_concurrent_streams == 4096


def test_the_environment_gives_lists_and_switches() -> None:
    settings, _ = load(None, {"RETINUE_LISTEN": "127.0.0.1:1, unix:/a", "RETINUE_INSECURE": "true"})
    assert settings.listen == ("127.0.0.1:1", "unix:/a")
    assert settings.insecure is True


def test_the_environment_names_the_file(file: Path) -> None:
    assert load(None, {"RETINUE_CONFIG": str(file)})[1].engine == "postgres"


def test_the_upstream_flag_is_an_address() -> None:
    settings, _ = load(None, {"RETINUE_UPSTREAM__TOKEN_FILE": "/t"}, upstream="q:7076")
    assert settings.upstream == config.Upstream(address="q:7076", token_file=Path("/t"))


def test_variables_of_clients_and_of_kubernetes_are_no_settings() -> None:
    load(
        None,
        {
            "RETINUE_ADDRESS": "x",
            "RETINUE_WORKQUEUE_ADDRESS": "x",
            "RETINUE_PORT": "tcp://10.0.0.1:7070",
            "RETINUE_PORT_7070_TCP_ADDR": "10.0.0.1",
            "RETINUE_WORKQUEUE_SERVICE_HOST": "10.0.0.1",
            "RETINUE_WORKQUEUE_SERVICE_PORT_GRPC": "7076",
            "RETINUE_LEADERELECTION__SCOPE": "pod",
        },
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lisen: []", "unknown setting lisen in {file}: did you mean listen?"),
        ("limits: {max_calls: 1}", "unknown setting limits.max_calls in {file}: did you mean limits.max_"),
        (
            "workqueue: {engin: x}",
            "unknown setting workqueue.engin in {file}: did you mean workqueue.engine?",
        ),
        ("workqueue: {zzzz: x}", "known are workqueue.engine, workqueue.retention"),
        ("drain_seconds: soon", "cannot use drain_seconds in {file}: Expected `float`, got `str`"),
        ("workqueue: {retention: {days: x}}", "cannot use workqueue.retention.days in {file}"),
        ("limits: 5", "cannot use limits in {file}"),
        ("listen: ['127.0.0.1:1', 5]", "cannot use listen in {file}"),
        ("tls: {cert_file: a}", "cannot use tls in {file}: Object missing required field `key_file`"),
        ("log: {format: xml}", "cannot use log.format in {file}"),
        ("a: [", "cannot read {file}: it is no YAML"),
        ("- 1", "must be a mapping"),
        ("drain_seconds: -1", "drain_seconds must be 0 or more"),
        ("limits: {max_concurrent_calls: 0}", "limits.max_concurrent_calls must be 1 or more"),
        ("listen: [nowhere]", "'nowhere' is no address: write HOST:PORT"),
        ("control: 127.0.0.1:1", "control must be unix:PATH"),
        ("require_token: true", "require_token needs token_file"),
        ("!!python/object/apply:os.system [x]", "it is no YAML"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert message.format(file=path) in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RETINUE_LISTN": "x"}, "unknown setting RETINUE_LISTN: did you mean RETINUE_LISTEN?"),
        ({"RETINUE_WORKQUEUE__ENGIN": "x"}, "did you mean RETINUE_WORKQUEUE__ENGINE?"),
        ({"RETINUE_DRAIN_SECONDS": "x"}, "cannot use RETINUE_DRAIN_SECONDS: Expected `float`"),
        ({"RETINUE_INSECURE": "maybe"}, "cannot use RETINUE_INSECURE"),
        ({"RETINUE_LIMITS": "1", "RETINUE_LIMITS__MAX_CONCURRENT_CALLS": "2"}, "sets the whole of limits"),
        ({"RETINUE_CONFIG": "/no/such"}, "cannot read /no/such"),
    ],
)
def test_a_wrong_variable_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, environment)
    assert message in str(caught.value)


def test_addresses_nobody_chose_follow_from_the_patterns() -> None:
    suite = command.with_defaults(config.Settings(), [])
    assert (suite.listen, suite.http) == (("127.0.0.1:7070",), "127.0.0.1:7080")
    assert suite.control == "unix:.retinue/control.sock"
    one = command.with_defaults(config.Settings(data_dir=Path("/d")), ["leaderelection"])
    assert (one.listen, one.http, one.control) == (("127.0.0.1:7075",), None, "unix:/d/control.sock")
    assert command.with_defaults(config.Settings(http="none"), []).http is None
