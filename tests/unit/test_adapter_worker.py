"""Claims about the worker process: what it answers, and that nobody hangs whatever becomes of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from servers import environment
from workers import alive, eventually

from retinue_server.adapter import worker
from retinue_server.adapter.core.collection import Limits
from retinue_server.adapter.core.packs import Pack, Rule
from retinue_server.adapter.core.points import Raw, RawFamily, Type
from retinue_server.adapter.core.spec import Kind, Spec
from retinue_server.adapter.engine import Answer, SourceError
from retinue_server.adapter.engines.work import ProcessWork
from retinue_server.adapter.worker import Declare, Forget, Take, Try, Worker

SHOP = Spec("shop", Kind.PROMETHEUS, "http://127.0.0.1:1")
PAGE = Answer(text=b"x 1\n", content_type="text/plain")


def declared(name: str = "shop", kind: str = "prometheus", pack: Pack | None = None) -> Declare:
    return Declare(name, {"target": name, "kind": kind}, Limits(), pack)


def take(text: bytes = b"", **fields: Any) -> Take:
    usual: dict[str, Any] = {"number": 7, "target": "shop", "content_type": "text/plain", "now_ms": 1}
    return Take(**usual | {"text": text, "document": None, "families": None} | fields)


@pytest.fixture
def played() -> Worker:
    made = Worker()
    made.told(declared())
    return made


@pytest.fixture
async def work() -> AsyncIterator[ProcessWork]:
    made = ProcessWork()
    await made.start()
    made.declare(SHOP, None)
    yield made
    await made.stop()


# What it answers


def test_an_answer_bears_the_number_of_its_question(played: Worker) -> None:
    taken: Any = played.answer(take(b"x 1\n"))
    assert taken.number == 7
    assert [one.text for one in taken.families] == [b'x{kind="prometheus",target="shop"} 1.0\n']
    assert taken.failure == ""


def test_half_a_page_is_none(played: Worker) -> None:
    taken: Any = played.answer(take(b"x 1\ny{\n"))
    assert (taken.families, taken.signals) == ([], [])
    assert "can't be read" in taken.failure


def test_a_page_is_read_as_its_kind_says_whatever_its_content_type(played: Worker) -> None:
    for content_type in ("", "application/json", "text/html; charset=utf-8"):
        taken: Any = played.answer(take(b"x 1\n", content_type=content_type))
        assert len(taken.families) == 1, content_type


def test_json_is_read_here(played: Worker) -> None:
    played.told(declared("j", "json", Pack(kind="json", metrics=[Rule(metric="n", path="/n")])))
    taken: Any = played.answer(take(b'{"n": 5}', target="j"))
    assert [one.series[0].value for one in taken.families] == [5.0]
    assert "no JSON" in played.answer(take(b"{", target="j")).failure


def test_a_target_that_nobody_declared_is_gone(played: Worker) -> None:
    assert played.answer(take(target="other")).failure == "it is gone"
    played.told(Forget("shop"))
    played.told(Forget("shop"))
    assert played.answer(take(b"x 1\n")).failure == "it is gone"


def test_a_target_that_is_declared_anew_goes_on_where_it_is_the_same(played: Worker) -> None:
    def began(now_ms: int) -> int:
        taken: Any = played.answer(take(b"# TYPE x_total counter\nx_total 1\n", now_ms=now_ms))
        return int(taken.families[0].series[0].start_ms)

    assert began(1000) == 1000
    played.told(declared())
    assert began(2000) == 1000
    played.told(Declare("shop", {"target": "shop", "kind": "prometheus", "service": "new"}, Limits(), None))
    assert began(3000) == 3000, "its labels are others"


def test_what_breaks_in_a_way_nobody_foresaw_costs_one_answer(played: Worker) -> None:
    broken = RawFamily("x", Type.GAUGE, [Raw({}, None)])  # type: ignore[arg-type] # what no source gives
    assert "nothing can be made" in played.answer(take(families=[broken])).failure
    assert played.answer(take(b"x 1\n")).failure == ""


def test_an_answer_that_cannot_be_told_is_a_failure(played: Worker) -> None:
    pack = Pack(kind="json", metrics=[Rule(metric="n", path="/*", labels={"l": "$1"})])
    played.told(declared("j", "json", pack))
    asked = take(b'{"\\ud800": 1, "\\ud801": "word"}', target="j")
    data = worker.encoded(asked, played.answer(asked))
    assert int.from_bytes(data[:4], "big") == len(data) - 4


def test_a_trial_tells_of_each_point_what_becomes_of_it() -> None:
    text = b'# TYPE a_ms gauge\na_ms{target="theirs"} 5\n# TYPE b_total counter\nb_total -1\n'
    tried: Any = Worker().answer(Try(3, declared(), text, "text/plain", None))
    assert [(one.raw, one.normalised, one.rejection) for one in tried.points] == [
        (
            "a_ms{target='theirs'} 5.0",
            'a_seconds{exported_target="theirs",kind="prometheus",target="shop"} 0.005\n',
            "",
        ),
        ("b{} -1.0", "", "negative_counter"),
    ]
    assert tried.number == 3


def test_a_trial_of_very_much_tells_how_much_it_left_out() -> None:
    text = b"".join(b'x{n="%d"} 1\n' % n for n in range(1500))
    tried: Any = Worker().answer(Try(3, declared(), text, "text/plain", None))
    assert (len(tried.points), tried.omitted) == (1000, 500)


# Whatever becomes of it


async def test_a_worker_that_is_killed_is_started_again_and_nobody_hangs(work: ProcessWork) -> None:
    await work.take("shop", PAGE, 1)
    first = work.working.pid
    os.kill(first, signal.SIGSTOP)
    asking = [asyncio.create_task(work.take("shop", PAGE, 2)) for _ in range(3)]
    await asyncio.sleep(0)
    os.kill(first, signal.SIGKILL)
    for one in asking:
        with pytest.raises(SourceError, match="started again"):
            await asyncio.wait_for(one, 20)
    taken = await work.take("shop", PAGE, 3)
    assert len(taken.families) == 1, "it was told again what is declared"
    assert work.working.pid != first
    assert work.working.restarts == 1


async def test_a_worker_that_is_stuck_is_ended(work: ProcessWork) -> None:
    await work.take("shop", PAGE, 1)
    stuck = work.working.pid
    work.working._patience_s = 0.05
    os.kill(stuck, signal.SIGSTOP)
    with pytest.raises(SourceError, match="started again"):
        await asyncio.wait_for(work.take("shop", PAGE, 2), 20)
    work.working._patience_s = 300.0
    assert (await work.take("shop", PAGE, 3)).failure == ""


async def test_a_huge_page_lets_others_between(work: ProcessWork) -> None:
    """4 MiB take a second or so to read; a small page is taken many times meanwhile."""
    work.declare(Spec("huge", Kind.PROMETHEUS, "http://127.0.0.1:2", limits=Limits(max_series=100)), None)
    text = b"".join(b'some_metric_name{number="%06d"} 1\n' % n for n in range(1 << 17))
    huge = asyncio.create_task(work.take("huge", Answer(text=text, content_type="text/plain"), 1))
    await work.take("shop", PAGE, 1)
    meanwhile = 0
    while not huge.done():
        await work.take("shop", PAGE, 1)
        meanwhile += 1
    assert meanwhile > 5
    assert (await huge).limited


async def test_who_asks_and_goes_away_leaves_nothing_behind(work: ProcessWork) -> None:
    await work.take("shop", PAGE, 1)
    asking = asyncio.create_task(work.take("shop", PAGE, 2))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait({asking})
    assert not work.working._waiting
    assert (await work.take("shop", PAGE, 3)).failure == ""


async def test_stopping_does_not_wait_for_what_is_under_way(work: ProcessWork) -> None:
    await work.take("shop", PAGE, 1)
    os.kill(work.working.pid, signal.SIGSTOP)
    asking = asyncio.create_task(work.take("shop", PAGE, 2))
    await asyncio.sleep(0)
    await asyncio.wait_for(work.stop(), 20)
    await work.stop()
    with pytest.raises(SourceError):
        await asking


async def test_many_at_once_each_get_their_own(work: ProcessWork) -> None:
    names = [f"t{n}" for n in range(20)]
    for name in names:
        work.declare(Spec(name, Kind.PROMETHEUS, "http://127.0.0.1:1"), None)
    found = await asyncio.gather(*(work.take(name, PAGE, 1) for name in names for _ in range(5)))
    for taken, name in zip(found, [name for name in names for _ in range(5)], strict=True):
        assert f'target="{name}"'.encode() in taken.families[0].text


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    program = (
        "import asyncio, os, sys\n"
        "from retinue_server.adapter.core.spec import Kind, Spec\n"
        "from retinue_server.adapter.engine import Answer\n"
        "from retinue_server.adapter.engines.work import ProcessWork\n"
        "async def main():\n"
        "    work = ProcessWork()\n"
        "    work.declare(Spec('a', Kind.PROMETHEUS, 'http://127.0.0.1:1'), None)\n"
        "    await work.take('a', Answer(text=b'x 1', content_type='text/plain'), 1)\n"
        "    print(work.working.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment()) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    eventually(lambda: not alive(pid), "the worker ends")


def test_ctrl_c_is_the_servers_alone() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "retinue_server.adapter.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in (1, 2):
            asked = take(number=number, target="none")
            process.stdin.write(worker.framed(msgspec.msgpack.encode(asked)))
            process.stdin.flush()
            assert worker.read(process.stdout)
            process.send_signal(signal.SIGINT)
        began = time.monotonic()
        process.stdin.close()
        assert process.wait(60) == 0
        assert time.monotonic() - began < 60
        assert process.stderr is not None
        assert process.stderr.read() == b""
