"""Claims about the files of rule packs and targets: read again when they change, and a wrong one changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from support.adapter_core import Core

from retinue_server.adapter import packfile, targetfile
from retinue_server.adapter.core.spec import Kind
from retinue_server.adapter.packfile import PackFiles
from retinue_server.adapter.targetfile import TargetFile, TargetFileError
from retinue_server.runtime.addresses import StartError

MINE = "kind: json\nabout: {}\n"


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packfile, "_LOOK_S", 0.002)
    monkeypatch.setattr(targetfile, "_LOOK_S", 0.002)


@pytest.fixture
async def core() -> AsyncIterator[Core]:
    made = Core()
    yield made
    await made.targets.stop()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def put(path: Path, text: str) -> None:
    """At once, as an editor does."""
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.replace(path)


# Rule packs


async def test_packs_of_the_directory_stand_beside_the_shipped_ones_or_in_their_place(tmp_path: Path) -> None:
    put(tmp_path / "mine.yaml", MINE.format("mine"))
    put(tmp_path / "redis.yaml", "kind: redis\nabout: ours\n")
    files = PackFiles(tmp_path)
    found = files.load()
    assert found["mine"].about == "mine"
    assert found["redis"].about == "ours"
    assert found["nginx"].about.startswith("nginx")


async def test_a_changed_pack_is_read_and_told_and_a_wrong_one_leaves_the_former(tmp_path: Path) -> None:
    path, told = tmp_path / "mine.yaml", asyncio.Event()
    put(path, MINE.format("one"))
    files = PackFiles(tmp_path)
    found = files.load()

    async def changed() -> None:
        told.set()

    files.changed = changed
    await files.start()
    put(path, MINE.format("two"))
    await asyncio.wait_for(told.wait(), 20)
    assert found["mine"].about == "two"
    put(path, "kind: [")
    await until(lambda: not files.ok)
    assert found["mine"].about == "two"
    told.clear()
    put(path, MINE.format("three"))
    await asyncio.wait_for(told.wait(), 20)
    assert files.ok
    assert found["mine"].about == "three"
    path.unlink()
    await until(lambda: "mine" not in found)
    await files.stop()
    await files.stop()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("mine.yaml", "kind: [", "mine.yaml"),
        ("My Pack.yaml", MINE, "a pack's name must be"),
        ("mine.yaml", MINE + "#" * (1 << 20), "longer than"),
    ],
)
async def test_a_broken_pack_is_refused_at_the_start(tmp_path: Path, name: str, text: str, said: str) -> None:
    put(tmp_path / name, text)
    with pytest.raises(StartError, match=said):
        PackFiles(tmp_path).load()


async def test_a_directory_that_is_none_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="no directory"):
        PackFiles(tmp_path / "none").load()


# Targets


def entry(target_id: str, **fields: str) -> str:
    said = {"kind": "PROMETHEUS", "endpoint": "http://127.0.0.1:1/"} | fields
    return f"- {{target_id: {target_id}, {', '.join(f'{key}: {value!r}' for key, value in said.items())}}}\n"


def write(path: Path, *entries: str) -> None:
    put(path, "targets:\n" + "".join(entries))


async def test_what_the_file_says_is_declared_and_again_when_it_changes(tmp_path: Path, core: Core) -> None:
    path = tmp_path / "targets.yaml"
    write(path, entry("a"), entry("b"))
    file = TargetFile(path, core.targets, must_exist=True)
    await file.start()
    assert core.targets.names() == ["a", "b"]
    assert core.targets.get("a").from_file
    kept = core.targets.get("a")
    write(path, entry("a"), entry("b", service="shop"), entry("c", kind="NGINX"))
    await until(lambda: "c" in core.targets.names())
    assert core.targets.get("a") is kept, "what did not change goes on"
    assert core.targets.get("b").spec.service == "shop"
    assert core.targets.get("c").spec.kind is Kind.NGINX
    write(path, entry("c", kind="NGINX"))
    await until(lambda: core.targets.names() == ["c"])
    await file.stop()
    await file.stop()


async def test_an_empty_file_declares_nothing_and_a_missing_one_may_come(tmp_path: Path, core: Core) -> None:
    path = tmp_path / "targets.yaml"
    file = TargetFile(path, core.targets, must_exist=False)
    await file.start()
    put(path, "")
    await until(lambda: file._stamp is not None)
    write(path, entry("a"))
    await until(lambda: core.targets.names() == ["a"])
    await file.stop()


WRONG = [
    ("targets: [", "while parsing"),
    ("target: []\n", "it must have `targets:`"),
    ("targets: {}\n", "it must have `targets:`"),
    ("- a\n", "it must have `targets:`"),
    ("targets: [a]\n", "targets[0]"),
    ("targets: [{target_id: a, kynd: NGINX}]\n", "kynd"),
    ("targets: [{target_id: a, kind: TELEX}]\n", "TELEX"),
    ("targets: [{target_id: a, kind: 7.5}]\n", "targets[0]"),
    ("targets: [{target_id: A, kind: REPORT}]\n", "must be 1 to 63"),
    ("targets: [{target_id: a, kind: OTLP}]\n", "must be one of"),
    ("targets: [{target_id: a, kind: REPORT, status: {state: 2}}]\n", "output only"),
    ("targets:\n" + entry("a") + entry("a"), "a is there twice"),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
async def test_a_wrong_file_is_refused_at_the_start(tmp_path: Path, core: Core, text: str, said: str) -> None:
    path = tmp_path / "targets.yaml"
    put(path, text)
    with pytest.raises(TargetFileError) as error:
        targetfile.read(path)
    assert said in str(error.value)
    with pytest.raises(StartError, match="cannot use"):
        await TargetFile(path, core.targets, must_exist=False).start()


async def test_a_file_that_is_named_and_missing_is_refused_at_the_start(tmp_path: Path, core: Core) -> None:
    with pytest.raises(StartError, match="No such file"):
        await TargetFile(tmp_path / "none.yaml", core.targets, must_exist=True).start()


async def test_a_wrong_file_leaves_the_last_good_one_until_it_is_right(
    tmp_path: Path, core: Core, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "targets.yaml"
    write(path, entry("a"))
    file = TargetFile(path, core.targets, must_exist=True)
    await file.start()
    for text, _ in WRONG:
        put(path, text)
        await until(lambda: not file.ok)
        assert core.targets.names() == ["a"]
        write(path, entry("a"), f"# {text!r}\n")
        await until(lambda: file.ok)
    assert "what it does not change stays" in caplog.text
    await file.stop()


async def test_one_that_is_refused_keeps_no_other_out_and_is_tried_again(tmp_path: Path) -> None:
    core = Core(most=2)
    await core.targets.start()
    path = tmp_path / "targets.yaml"
    write(path, entry("a"))
    file = TargetFile(path, core.targets, must_exist=True)
    await file.start()
    write(path, entry("a"), entry("b"), entry("c"))
    await until(lambda: not file.ok)
    assert core.targets.names() == ["a", "b"]
    core.targets._most = 3
    await until(lambda: file.ok)
    assert core.targets.names() == ["a", "b", "c"]
    await file.stop()
    await core.targets.stop()
