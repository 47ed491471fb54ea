"""Faults of the ambassador under a steady load, and broken ambassadors that the checker must catch."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pytest
from faults.tables import LONG, Row
from support.ambassador_faults.callers import Caller
from support.ambassador_faults.campaign import KINDS, SLACK_NS, Campaign
from support.ambassador_faults.checks import Finding, check
from support.ambassador_faults.history import Fault, Kept
from support.ambassador_faults.report import totals
from support.ambassador_faults.schedule import Kind
from support.ambassador_faults.stage import Side, Stage, declared
from support.history.recorder import boot_ns
from support.upstreams import LineServer, WebServer, envoy_or_skip, running

pytestmark = pytest.mark.timeout(3_600 if LONG else 180)

SHORT = {
    "child": [Kind.WEIGHTS, Kind.POLICY, Kind.CERTIFICATES, Kind.HANGS, Kind.GONE, Kind.KILL_ENVOY],
    "attach": [Kind.POLICY, Kind.REFUSED, Kind.FAILS, Kind.KILL_CONTROL],
}
"""Each once; `make faults` plays all, again and again."""


@pytest.fixture
def where() -> Iterator[Path]:
    """Short, for paths of sockets, and open to the database, which runs as nobody."""
    with tempfile.TemporaryDirectory(prefix="amb-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.mark.parametrize("mode", KINDS)
async def test_no_call_fails_but_by_a_fault_of_its_own_upstream(mode: str, where: Path, row: Row) -> None:
    """Every protocol through both data planes, while endpoints flip; `python -m support.ambassador_faults` has more."""
    envoy_or_skip()
    seed, began = random.SystemRandom().getrandbits(31), time.monotonic()
    kinds: Collection[Kind] = KINDS[mode] if LONG else SHORT[mode]
    async with Campaign(where, seed, mode, kinds=kinds, databases=LONG or mode == "child") as campaign:
        await campaign.run(60 if LONG else 0)
        story, findings = campaign.story(), campaign.findings()
    figures = totals(campaign, story, findings, time.monotonic() - began)
    assert findings == [], (seed, figures)
    assert set(kinds) <= set(campaign.faults)
    assert all(len(one.before) > 10 for one in story.kept)
    assert bool(story.kept) == (mode == "attach")
    row(
        "the ambassador under faults", mode=mode, seed=seed, **{k.replace(" ", "_"): n for k, n in figures.items() if n}
    )


DEFECTS = {
    "cuts-what-is-open": "served",
    "listens-anew": "served",
    "serves-the-former": "right_server",
    "leaves-at-once": "served",
}
PLAYS = 4


async def test_an_ambassador_that_breaks_a_rule_is_caught(where: Path) -> None:
    """Each upstream breaks the rule that is its name, but for one. Some breaches need a call at the right moment: what
    one play does not bring to light, the next does."""
    envoy_or_skip()
    caught: dict[str, str] = {}
    changed: set[str] = set()
    for number in range(PLAYS):
        found = await broken(where / str(number))
        caught |= {one.what.partition(":")[0]: one.check for one in found if one.check != "unchanged"}
        changed |= {one.what.split()[1] for one in found if one.check == "unchanged"}
        if caught.keys() >= DEFECTS.keys():
            break
    assert caught == DEFECTS
    assert changed == {"changes-what-stays"}


async def broken(where: Path) -> Sequence[Finding]:
    """What the checkers say of one play."""
    where.mkdir(mode=0o755)
    lines, web = [LineServer("one"), LineServer("two")], WebServer("web")
    web.delay_s = 0.4
    async with running(*lines, web), Stage(where, module="faults.broken_ambassadors") as stage:
        native, child, attach = await asyncio.gather(*map(stage.side, ("native", "child", "attach")))
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for name in ("right", "cuts-what-is-open", "listens-anew", "serves-the-former"):
                one = declared(name, "tcp", {server.name: server.address for server in lines})
                await native.declare(one, ["one"])
                for stays in (True, False):
                    group.create_task(Caller(stage.notes, name, "tcp", one.port, stays=stays).run(over))
            leaving = declared("leaves-at-once", "http", {"web": web.address})
            await child.declare(leaving)
            for _ in range(3):
                group.create_task(Caller(stage.notes, leaving.name, "http", leaving.port, stays=False).run(over))
            await attach.declare(declared("changes-what-stays", "http", {"web": web.address}))
            await break_them(stage, native, child, attach)
            over.set()
        return check(stage.story(), SLACK_NS)


async def break_them(stage: Stage, native: Side, child: Side, attach: Side) -> None:
    """Changes that nobody would notice, if the rules were kept."""
    for name in native.upstreams:
        await native.serve(name, {"two": 1})
    former = boot_ns() + SLACK_NS
    async with asyncio.timeout(30):
        while not {call.sent.upstream for call in stage.story().calls if call.sent.at > former} >= set(
            native.upstreams
        ):
            await asyncio.sleep(0.1)
    before = await attach.has()
    assert attach.server is not None
    await asyncio.to_thread(attach.server.kill)
    await attach.start_control()
    await attach.declare_again()
    stage.notes.add(Kept(boot_ns(), before, await attach.has()))
    stage.notes.add(Fault("SIGTERM", boot_ns(), ("leaves-at-once",), spares=True))
    assert child.server is not None
    await asyncio.to_thread(child.server.stop)
