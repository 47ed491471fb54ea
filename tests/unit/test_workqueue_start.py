"""Claims about data directories that can't be used: one message, exit code 1, no traceback."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import apsw
import pytest
from servers import environment

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def corrupt(where: Path) -> None:
    (where / "queue.db").write_bytes(b"this was a database once" * 400)


def newer(where: Path) -> None:
    db = apsw.Connection(str(where / "queue.db"))
    db.pragma("user_version", 9)
    db.close()


def a_directory(where: Path) -> None:
    (where / "queue.db").mkdir()


def blobs_in_a_file(where: Path) -> None:
    (where / "blobs").touch()


def no_directory(where: Path) -> None:
    where.rmdir()
    where.touch()


def start(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "retinue_server", "workqueue", "--listen", "127.0.0.1:0", "--data-dir", "data"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path, env=environment()
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (corrupt, "cannot open data/workqueue/queue.db: file is not a database"),
        (newer, "cannot open data/workqueue/queue.db: its schema is version 9"),
        (a_directory, "cannot open data/workqueue/queue.db: "),
        (blobs_in_a_file, "cannot keep blobs in data/workqueue/blobs: "),
        (no_directory, "cannot use the data directory data/workqueue: "),
    ],
)
def test_an_unusable_data_directory_is_one_message_and_exit_code_1(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    where = tmp_path / "data" / "workqueue"
    where.mkdir(parents=True)
    spoil(where)
    done = start(tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"retinue-server: {message}")
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_ready_file_that_cannot_be_written_is_told_without_a_traceback(tmp_path: Path) -> None:
    done = start(tmp_path, "--ready-file", "missing/ready")
    assert done.returncode == 1
    assert "cannot write the ready file missing/ready: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
