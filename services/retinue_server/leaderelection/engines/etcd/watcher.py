"""One watch over everything under the prefix; it goes on where it ended, after whatever ended it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from grpc import aio

from retinue_server.leaderelection.engines.etcd import kv_pb2, rpc_pb2
from retinue_server.leaderelection.engines.etcd.client import WITH_LEADER
from retinue_server.runtime.errors import Unavailable

if TYPE_CHECKING:
    from retinue_server.leaderelection.engines.etcd.client import Client, Endpoint

_log = logging.getLogger(__name__)

_AGAIN_S = 0.1
"""How soon a watch that broke is opened again."""


class Watcher:
    """Tells of changes in order; or that anything may have changed, when some could not be told."""

    def __init__(
        self,
        client: Client,
        keys: tuple[bytes, bytes],
        changed: Callable[[Iterable[kv_pb2.Event]], None],
        missed: Callable[[], None],
    ) -> None:
        self._client, self._keys = client, keys
        self._changed, self._missed = changed, missed
        self._next = 0
        """The revision to go on from; 0 = none was ever seen."""
        self._call: Any = None
        self.watching = asyncio.Event()
        """Set once changes are told."""
        client.moved = self.reopen

    def reopen(self) -> None:
        """Leaves the endpoint."""
        if self._call is not None:
            self._call.cancel()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            endpoint = self._client.endpoint()
            try:
                await self._follow(endpoint)
            except (aio.AioRpcError, TimeoutError) as error:
                _log.debug("the watch at %s broke: %s", endpoint.address, error)
                self._client.leave(endpoint)
            except Unavailable:
                return
            except asyncio.CancelledError:  # of the call, by `reopen`, or of this task
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
            except Exception:  # noqa: BLE001 - a watch that ends would leave its server to look every few seconds
                _log.exception("cannot watch etcd for the moment")
            await asyncio.sleep(_AGAIN_S)

    async def _follow(self, endpoint: Endpoint) -> None:
        call: Any = endpoint.watch.Watch(metadata=WITH_LEADER)
        self._call = call
        try:
            key, end = self._keys
            create = rpc_pb2.WatchCreateRequest(key=key, range_end=end, start_revision=self._next)
            async with asyncio.timeout(self._client.timeout_s):
                await call.write(rpc_pb2.WatchRequest(create_request=create))
                answer = await call.read()
            while answer is not aio.EOF and self._take(answer):
                answer = await call.read()
        finally:
            self._call = None
            call.cancel()

    def _take(self, answer: rpc_pb2.WatchResponse) -> bool:
        """Whether this watch goes on."""
        if answer.canceled:
            _log.info("etcd ended a watch: %s", answer.cancel_reason or f"compacted to {answer.compact_revision}")
            self._restart(answer.compact_revision)
            return False
        if answer.created:
            now = answer.header.revision
            if not self._next or now + 1 < self._next:  # at first, or the store went back: restored, or it lags behind
                ahead = bool(self._next)
                self._restart(now + 1)
                self.watching.set()
                return not ahead
        if answer.events:
            self._next = answer.events[-1].kv.mod_revision + 1
            self._changed(answer.events)
        return True

    def _restart(self, revision: int) -> None:
        self._next = revision
        self._missed()
