"""Many watchers of one match in one process: answers each line of its input with what they have heard so far."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter

from grpc import aio

from retinue.adapter.v1 import adapter_service_pb2 as api
from retinue.adapter.v1.adapter_service_pb2_grpc import AdapterServiceStub


class _Watchers:
    def __init__(self, address: str, request: api.WatchMetricsRequest) -> None:
        self._address, self._request = address, request
        self.heard: Counter[str] = Counter()

    async def watch(self, synced: asyncio.Event) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection each, as apps have
        async with aio.insecure_channel(self._address, options=options) as channel:
            async for told in AdapterServiceStub(channel).WatchMetrics(self._request):
                self.heard["messages"] += 1
                self.heard["series"] += sum(len(metric.series) for metric in told.metrics)
                self.heard["coalesced"] += told.coalesced
                if told.synced:
                    synced.set()


async def _main() -> None:
    address, count, name, *targets = sys.argv[1:]
    request = api.WatchMetricsRequest(matches=[api.Match(name=name, target_ids=targets)])
    watchers = _Watchers(address, request)
    synced = [asyncio.Event() for _ in range(int(count))]
    tasks = [asyncio.create_task(watchers.watch(event)) for event in synced]
    await asyncio.gather(*(event.wait() for event in synced))
    print("{}", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        for ended in (task for task in tasks if task.done()):
            ended.result()
        heard = {key: watchers.heard[key] for key in ("messages", "series", "coalesced")}
        print(json.dumps(heard), flush=True)


if __name__ == "__main__":
    asyncio.run(_main())
