"""What the end of a command means, and where its output may go."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import pytest

from retinue.client.runner import EXITS, Files, Options, Runner, judge, published_path
from retinue.client.worker import Failed, Job
from retinue.workqueue.v1 import task_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("code", "action", "reason"),
    [
        (0, "complete", "EXIT_0"),
        (75, "retry", "EXIT_75"),
        (65, "final", "EXIT_65"),
        (99, "release", "EXIT_99"),
        (1, "retry", "EXIT_1"),
        (127, "retry", "EXIT_127"),
        (255, "retry", "EXIT_255"),
        (-9, "retry", "SIGNAL_9"),
        (137, "retry", "SIGNAL_9"),
        (143, "retry", "SIGNAL_15"),
    ],
)
def test_the_exit_map(code: int, action: str, reason: str) -> None:
    assert judge(code, EXITS) == (action, reason)


def test_a_named_code_wins_over_the_shells_signals() -> None:
    assert judge(137, {**EXITS, 137: "final"}) == ("final", "EXIT_137")


def job(task_id: str, **labels: str) -> Job:
    return Job(pb.Lease(task_id=task_id, labels=labels), cast("Any", None), time.monotonic())


def test_an_output_goes_under_its_path_or_its_id(tmp_path: Path) -> None:
    assert published_path(tmp_path, job("t", path="a/b.txt")) == tmp_path / "a/b.txt"
    assert published_path(tmp_path, job("team/t:1")) == tmp_path / "team/t:1"


async def test_an_attempt_that_no_longer_counts_publishes_nothing(tmp_path: Path) -> None:
    (tmp_path / "attempt/output").mkdir(parents=True)
    output, late = tmp_path / "attempt/output/data", job("t")
    output.write_text("late")
    async with Runner(cast("Any", None), Options(["cat"], work_dir=tmp_path, output_dir=tmp_path / "out")) as runner:
        late.stopping.set()
        runner._put_out(output, late)
        assert not (tmp_path / "out/t").exists()
        runner._put_out(output, job("t"))
    assert (tmp_path / "out/t").read_text() == "late"


@pytest.mark.parametrize("path", ["..", ".", "../x", "/etc/passwd", "a/../../x", "nul\0", ".retinue-tmp/x", "out/x"])
def test_an_output_never_leaves_its_directory(tmp_path: Path, path: str) -> None:
    (tmp_path / "out").symlink_to("/")
    with pytest.raises(Failed) as caught:
        published_path(tmp_path, job("t", path=path))
    assert caught.value.final


def test_the_output_is_the_named_file_or_the_only_one(tmp_path: Path) -> None:
    files = Files(tmp_path, "data")
    (tmp_path / "output").mkdir()
    assert files.find_output() is None
    (tmp_path / "output/other.png").write_text("x")
    assert files.find_output() == tmp_path / "output/other.png"
    (tmp_path / "output/third").write_text("x")
    with pytest.raises(Failed, match=r"other\.png, third"):
        files.find_output()
    (tmp_path / "output/data").write_text("x")
    assert files.find_output() == tmp_path / "output/data"


def test_only_the_four_placeholders_are_filled_in(tmp_path: Path) -> None:
    files = Files(tmp_path, "data")
    assert files.fill("{print $1} {input}.x") == f"{{print $1}} {tmp_path}/input/data.x"
    assert files.fill("{dir}{task}{output}") == f"{tmp_path}{tmp_path}/task.json{tmp_path}/output/data"
