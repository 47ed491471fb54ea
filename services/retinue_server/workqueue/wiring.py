"""Settings -> engine -> core -> servicers, by explicit constructors."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec

from retinue_server.runtime.config import ConfigError
from retinue_server.runtime.dispatch import Pattern, Service
from retinue_server.runtime.lifecycle import DataDirLock, fatal
from retinue_server.workqueue import admin_service, blob_service, metrics, service
from retinue_server.workqueue.config import WorkQueueSettings
from retinue_server.workqueue.core.queue import WorkQueue, read_clocks
from retinue_server.workqueue.engines.local_blobs import LocalBlobs
from retinue_server.workqueue.sweeper import Sweeper

if TYPE_CHECKING:
    from collections.abc import Callable

    from retinue_server.runtime.config import Settings, Upstream
    from retinue_server.runtime.dispatch import Part
    from retinue_server.workqueue.engine import BlobStore, Capabilities, Engine, Instant

SETTINGS = WorkQueueSettings
NAME = "workqueue"
_SURVIVES = {1: "nothing: it is lost with the process", 2: "a crash of the process", 3: "power loss"}


async def wire(settings: Settings, section: WorkQueueSettings) -> Pattern:
    """The work queue: a coordinator over its engine or, with an upstream, a relay."""
    if settings.upstream is not None:
        return _relay(settings.upstream)
    store = _postgres(section) if section.engine == "postgres" else _local(settings, section)
    engine, blobs = store.engine, store.blobs
    queue = WorkQueue(
        engine,
        blobs,
        clock=store.clock,
        strict_queues=section.strict_queues,
        drain_ms=int(settings.drain_seconds * 1000),
    )
    store.listen(queue.hear_ready)
    sweeper = Sweeper(queue, section.blob_idle_seconds * 1000)
    admin = admin_service.WorkQueueAdminService(queue, section.max_blob_bytes)
    return Pattern(
        name=NAME,
        services=(
            Service(service.DESCRIPTOR, service.WorkQueueService(queue)),
            Service(admin_service.DESCRIPTOR, admin, admin_service.ROLES),
            Service(blob_service.DESCRIPTOR, blob_service.BlobService(blobs)),
        ),
        parts=(*store.before, engine, blobs, sweeper),
        health=sweeper,
        quiesce=queue.quiesce,
        metrics=partial(metrics.families, queue),
        notices=lambda: [_notice(engine.capabilities)],
    )


def _notice(can: Capabilities) -> str:
    return f"engine {can.engine}: an OK survives {_SURVIVES[can.durability]}"


def _relay(upstream: Upstream) -> Pattern:
    from retinue_server.runtime.relay import RelayServicer, UpstreamChannel  # noqa: PLC0415 - relays only

    channel = UpstreamChannel(upstream)
    descriptors = (service.DESCRIPTOR, admin_service.DESCRIPTOR, blob_service.DESCRIPTOR)
    return Pattern(
        name=NAME,
        services=[Service(descriptor, RelayServicer(descriptor, channel)) for descriptor in descriptors],
        parts=(channel,),
        health=channel,
        notices=lambda: [f"relays to {upstream.address}: an OK is the coordinator's"],
    )


class _Store(msgspec.Struct, frozen=True):
    """Where tasks and blobs live, which clock counts, and what starts first."""

    engine: Engine
    blobs: BlobStore
    clock: Callable[[], Instant] = read_clocks
    before: tuple[Part, ...] = ()
    listen: Callable[[Callable[[str, int], None]], None] = lambda _: None


def _local(settings: Settings, section: WorkQueueSettings) -> _Store:
    where, reserve = settings.data_dir / NAME / "blobs", section.disk_reserve_bytes
    blobs = LocalBlobs(where, section.max_blob_bytes, fatal, reserve_bytes=reserve)
    return _Store(_local_engine(settings, section), blobs, before=(DataDirLock(settings.data_dir / NAME),))


def _local_engine(settings: Settings, section: WorkQueueSettings) -> Engine:
    if section.engine == "memory":
        from retinue_server.workqueue.engines.memory import MemoryEngine  # noqa: PLC0415 - the chosen engine only

        return MemoryEngine()
    try:
        from retinue_server.workqueue.engines.sqlite import SqliteEngine  # noqa: PLC0415 - the chosen engine only
    except ImportError as error:
        raise ConfigError("cannot use engine sqlite: install it with pip install 'retinue-server[sqlite]'") from error
    return SqliteEngine(settings.data_dir / NAME / "queue.db", fatal, reserve_bytes=section.disk_reserve_bytes)


def _postgres(section: WorkQueueSettings) -> _Store:
    try:
        from retinue_server.workqueue.engines.postgres import PostgresEngine  # noqa: PLC0415 - the chosen engine only
    except ImportError as error:
        raise ConfigError(
            "cannot use engine postgres: install it with pip install 'retinue-server[postgres]'"
        ) from error
    said = section.postgres
    try:
        engine = PostgresEngine(
            said.url,
            password_file=said.password_file,
            schema=said.schema,
            connections=said.connections,
            prepared_statements=said.prepared_statements,
            listen_url=said.listen_url,
        )
    except ValueError as error:
        raise ConfigError(f"cannot use workqueue.postgres: {error}") from None
    return _Store(engine, engine.blobs(section.max_blob_bytes), engine.now, listen=engine.on_ready)
