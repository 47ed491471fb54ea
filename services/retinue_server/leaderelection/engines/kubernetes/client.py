"""Leases over the API: whatever hangs, there is an answer or an error within two seconds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2
from lightkube import ApiError, AsyncClient
from lightkube.generic_resource import create_namespaced_resource

from retinue_server.leaderelection.engines.kubernetes.lease import Lease
from retinue_server.runtime import kubernetes
from retinue_server.runtime.errors import Reason, RetinueError, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable
    from pathlib import Path

T = TypeVar("T")

_log = logging.getLogger(__name__)

PATIENCE_S = 2.0
_WATCH_S = 300
"""After which the API server ends a watch, to be begun again."""
_LEASE: Any = create_namespaced_resource("coordination.k8s.io", "v1", "Lease", "leases")
"""Leases as they come, so that nothing is lost that this server does not know of."""
_MISSING, _CONFLICT = 404, 409
_FORBIDDEN = 401, 403
_FAILURES = (httpx2.HTTPError, TimeoutError, LookupError, ValueError)
"""The last two are what the client raises for answers that are none of an API server: a proxy's, for example."""


class ConflictError(Exception):
    """Somebody else was faster."""


class ForbiddenError(Unavailable):
    """The role does not allow it."""


class Leases:
    """The Leases of one namespace. Its methods raise Unavailable; StartError here if it is not known where they are."""

    def __init__(self, kubeconfig: Path | None, namespace: str) -> None:
        config = kubernetes.find(kubeconfig, "leaderelection.kubernetes.kubeconfig")
        self.namespace = namespace or config.namespace
        patience = httpx2.Timeout(PATIENCE_S)
        self._calls = AsyncClient(config, self.namespace, patience)
        self._watches = AsyncClient(config, self.namespace, patience)

    async def get(self, name: str) -> Lease | None:
        """As it is now; None if there is none."""
        with contextlib.suppress(_MissingError):
            return _lease(await _answered(self._calls.get(_LEASE, name)))
        return None

    async def put(self, lease: Lease) -> Lease | None:
        """Stores what was made from the latest; raises ConflictError if that is no longer so. None if it is gone."""
        with contextlib.suppress(_MissingError):
            return _lease(await _answered(self._calls.replace(_LEASE(lease.body))))
        return None

    async def create(self, lease: Lease) -> Lease:
        """Stores a new one; raises ConflictError if there is one."""
        return _lease(await _answered(self._calls.create(_LEASE(lease.body))))

    async def list(self) -> list[Lease]:
        """All of the namespace; raises ForbiddenError for a role that knows them by name only."""

        async def listed() -> list[dict[str, Any]]:
            return [body async for body in self._calls.list(_LEASE)]

        return [_lease(body) for body in await _answered(listed())]

    async def watch(self, name: str | None) -> AsyncGenerator[Lease]:
        """One by name, or all of the namespace: as they are, then each change, until it fails or the server ends it."""
        fields: Any = {"metadata.name": name} if name else None
        changes: Any = self._watches.watch(_LEASE, fields=fields, server_timeout=_WATCH_S)
        try:
            async with contextlib.aclosing(changes):
                async for _, body in changes:
                    yield _lease(body)
        except _FAILURES as error:
            raise _translated(error) from error

    async def close(self) -> None:
        """Closes the connections."""
        for client in (self._calls, self._watches):
            await client.close()


def _lease(body: dict[str, Any]) -> Lease:
    try:
        return Lease(body)
    except ValueError as error:
        name = body.get("metadata", {}).get("name")
        raise Unavailable(
            f"cannot go on with election {name}: somebody spoiled the annotations of its Lease: {error}",
            reason=Reason.ENGINE_UNAVAILABLE,
            retry_ms=5_000,
        ) from error


class _MissingError(Exception):
    """There is no such Lease."""


async def _answered(call: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await call
    except _FAILURES as error:
        if _code(error) == _MISSING:
            raise _MissingError from error
        if _code(error) == _CONFLICT:
            raise ConflictError from error
        raise _translated(error) from error


def _code(error: BaseException) -> int:
    if isinstance(error, ApiError):
        return error.status.code or 0
    return error.response.status_code if isinstance(error, httpx2.HTTPStatusError) else 0


def _translated(error: BaseException) -> RetinueError:
    _log.info("the API server failed: %s", str(error) or type(error).__name__)
    if _code(error) in _FORBIDDEN:
        return ForbiddenError(
            "cannot go on: the API server does not allow it; apply deploy/leaderelection/kubernetes.yaml",
            reason=Reason.ENGINE_UNAVAILABLE,
            retry_ms=5_000,
        )
    return Unavailable(
        "cannot go on: the engine does not answer; see the server's log",
        reason=Reason.ENGINE_UNAVAILABLE,
        retry_ms=500,
    )
