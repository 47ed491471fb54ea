"""The adapter from end to end; prints clients/transcripts/adapter.txt. Give a name of your own to run it twice.

It is the app that is collected, too: a shop that serves a page of metrics. RETINUE_CONTROL_ADDRESS must name the
server's control socket, since targets are for operators.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from retinue.adapter.v1 import metric_pb2 as metric_pb
from retinue.client import Adapter, RetinueError
from retinue.client.adapter import Change, counter, declaration, gauge, match, signal_name, state_name, target
from retinue.client.address import control_address

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Iterable

    from retinue.adapter.v1 import target_pb2 as pb

INTERVAL = 1.0
"""In seconds."""


class Shop:
    """An app with a page in Prometheus' text format."""

    def __init__(self) -> None:
        self.served, self.failed, self.jobs = 90, 10, -3
        self.works = True

    def page(self) -> str:
        return f"""\
# TYPE http_requests_total counter
http_requests_total{{code="200"}} {self.served}
http_requests_total{{code="500"}} {self.failed}
# TYPE queue_age_milliseconds gauge
queue_age_milliseconds 1500
# TYPE process_open_fds gauge
process_open_fds 5
# TYPE process_max_fds gauge
process_max_fds 20
# TYPE jobs_total counter
jobs_total {self.jobs}
"""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        status, body = ("200 OK", self.page()) if self.works else ("500 Internal Server Error", "")
        writer.write(f"HTTP/1.1 {status}\r\ncontent-type: text/plain\r\ncontent-length: {len(body)}\r\n\r\n".encode())
        writer.write(body.encode())
        await writer.drain()
        writer.close()


async def main(name: str) -> None:
    shop = Shop()
    async with (
        await asyncio.start_server(shop.answer, "127.0.0.1") as page,
        Adapter() as app,
        Adapter(control_address()) as operator,
    ):
        wanted = target(
            name, "PROMETHEUS", f"http://127.0.0.1:{page.sockets[0].getsockname()[1]}/metrics", interval=INTERVAL
        )
        await refuse(app, operator, wanted)
        await attempt(operator, wanted)
        shop.jobs = 3
        await create(operator, wanted)
        await look(app, name)
        async with aclosing(app.watch(match("http_requests", targets=[name]))) as changes:
            await watch(app, changes, shop, name)
            await spoil(app, shop, name)
            await report(app, operator, name)
            await delete(operator, changes, name)


async def refuse(app: Adapter, operator: Adapter, wanted: pb.Target) -> None:
    print(f"an app declares a target: {told(await refused(app.create(wanted)))}")
    nonsense = target("no spaces, please", "REDIS", "nowhere", interval=0.5)
    refusal = await refused(operator.create(nonsense))
    print(f"declared nonsense: {told(refusal)}")
    for field in sorted(violation.field for violation in refusal.violations):
        print(f"  {field}")
    unknown = target(wanted.target_id, "JSON", wanted.endpoint, rule_pack="nobody-knows")
    print(f"declared with a rule pack that nobody knows: {told(await refused(operator.create(unknown)))}")


async def attempt(operator: Adapter, wanted: pb.Target) -> None:
    """A dry run: what comes beside what becomes of it."""
    found = await operator.test(wanted)
    print(f"tried, {len(found.points)} points:")
    for point in found.points:
        print(f"  {point.raw} becomes {bare(point.normalised) or f'nothing: {point.rejection}'}")
    print(f"nothing is kept of it: {told(await refused(operator.get(wanted.target_id)))}")


async def create(operator: Adapter, wanted: pb.Target) -> None:
    made = await operator.create(wanted, wait=10)
    print(f"created: {state_name(made)}, {made.status.series} series")
    again = await operator.create(wanted)
    print(f"created again: the same: {yes(again.etag == made.etag)}")
    named = declaration(made)
    named.service = "shop"
    print(f"created with another service: {told(await refused(operator.create(named)))}")
    print(f"updated under an etag of long ago: {told(await refused(operator.update(named, etag='0')))}")
    updated = await operator.update(named, etag=made.etag)
    print(f"updated: of service {updated.service}, another etag: {yes(updated.etag != made.etag)}")


async def look(app: Adapter, name: str) -> None:
    [found] = await app.signals(name)
    print("its golden signals:")
    for signal in found.signals:
        print(f"  {shown(signal)}")
    described = await app.describe(match(targets=[name]))
    print("described:")
    for metric in described:
        kind = metric_pb.MetricType.Name(metric.type).removeprefix("METRIC_TYPE_")
        print(f"  {metric.name}: {kind}{f' in {metric.unit}' if metric.unit else ''}")
    [metric] = await app.metrics(match("queue_*", targets=[name]), max_age=60)
    print(f"read: {metric.name} is {metric.series[0].number:g}")


async def watch(app: Adapter, changes: AsyncGenerator[Change], shop: Shop, name: str) -> None:
    first = await anext(changes)
    print(f"watched: {', '.join(counts(first.metrics))}; the snapshot is complete: {yes(first.synced)}")
    shop.served += 30
    print(f"30 more requests, the watch tells: {', '.join(counts((await anext(changes)).metrics))}")
    [found] = await app.signals(name)
    requests = found.signals[0]
    print(f"requests are {requests.number:g}, their rate is known: {yes(requests.HasField('rate'))}")


async def spoil(app: Adapter, shop: Shop, name: str) -> None:
    """A point that makes no sense costs itself, an app that is away nothing of what was collected."""
    shop.jobs = -3
    [refused] = (await until(app, name, "degraded")).rejections
    print(f"a counter below zero: degraded, refused for {refused.reason}: {yes(refused.points > 0)}")
    shop.works = False
    print(f"the page breaks: stale, {(await until(app, name, 'stale')).message}")
    [found] = await app.signals(name)
    print(f"what was collected stands: {shown(found.signals[0])}")
    shop.works, shop.jobs = True, 4
    await until(app, name, "up")
    print("it is mended: up")


async def report(app: Adapter, operator: Adapter, name: str) -> None:
    """What an app tells by itself."""
    own = f"{name}-own"
    await operator.create(target(own, "REPORT", interval=INTERVAL, service="shop"))
    points = [gauge("cart_age", 2500, unit="ms", kind="guest"), counter("orders", 17), counter("refunds", -1)]
    reported = await app.report(own, *points)
    reasons = ", ".join(one.reason for one in reported.rejections)
    print(f"reported {len(points)} points of our own: {reported.accepted} taken, refused for {reasons}")
    async with aclosing(app.watch(match(targets=[own]))) as changes:
        async for change in changes:
            if change.metrics:
                break
    for metric in change.metrics:
        [series] = metric.series
        print(f"  {metric.name} is {series.number:g}, service {series.labels['service']}")
    print(f"reported to a target that is collected: {told(await refused(app.report(name, *points)))}")
    await operator.delete(own)


async def delete(operator: Adapter, changes: AsyncGenerator[Change], name: str) -> None:
    print(f"deleted: {yes(await operator.delete(name))}, again: {yes(await operator.delete(name))}")
    async for change in changes:
        gone = sum(series.stale for metric in change.metrics for series in metric.series)
        if gone:
            print(f"the watch tells: {gone} series are gone")
            break
    print(f"asked for it: {told(await refused(operator.get(name)))}")


async def until(app: Adapter, name: str, state: str) -> pb.TargetStatus:
    """Its status, once it is in that state."""
    while state_name(found := await app.get(name)) != state:  # noqa: ASYNC110 - nothing tells of states
        await asyncio.sleep(INTERVAL / 10)
    return found.status


def counts(metrics: Iterable[metric_pb.Metric]) -> list[str]:
    """By the label `code`."""
    found = ((one.labels["code"], one.number) for metric in metrics for one in metric.series)
    return [f"{code} {number:g}" for code, number in sorted(found)]


def shown(signal: metric_pb.Signal) -> str:
    if signal.absent_reason:
        return f"{signal_name(signal)} absent: {signal.absent_reason}"
    return f"{signal_name(signal)} {signal.number:g} of {signal.source}"


def bare(sample: str) -> str:
    """A line of `/metrics` without its labels."""
    name, _, rest = sample.partition("{")
    return f"{name}{rest.rpartition('}')[2]}".strip()


async def refused(call: Awaitable[Any]) -> RetinueError:
    try:
        await call
    except RetinueError as error:
        return error
    raise AssertionError("it was not refused")


def told(refusal: RetinueError) -> str:
    return f"{refusal.code.name} {refusal.reason}"


def yes(value: object) -> str:
    return "true" if value else "false"


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "transcript"))
