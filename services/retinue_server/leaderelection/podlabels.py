"""Labels on pods that say who leads, for a Service to select its endpoints by: a hint, since only the token decides.

The new leader takes the label from every other pod before it puts it on its own, so that a node that is gone leaves no
second one. A server that was stopped meanwhile finds that it does not lead any more, and takes its own away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

import httpx2
from lightkube import AsyncClient
from lightkube.resources.core_v1 import Pod
from lightkube.types import PatchType

from retinue_server.runtime import kubernetes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from retinue_server.leaderelection.core.requests import Transition

log = logging.getLogger(__name__)

VALUE = "true"
_PATIENCE_S = 2.0
_AGAIN_S = 1.0, 2.0, 5.0
"""How soon it is tried again."""
_FAILURES = (httpx2.HTTPError, TimeoutError, LookupError, ValueError)
"""The last two are what the client raises for answers that are none of an API server."""


class PodLabels:
    """A part: keeps the labels of this server's pod as its terms are."""

    def __init__(self, labels: Mapping[str, str], pod: str, kubeconfig: Path | None, namespace: str) -> None:
        """`labels` says the label's key by election; raises StartError if it is not known where the API server is."""
        config = kubernetes.find(kubeconfig, "leaderelection.kubernetes.kubeconfig")
        self._labels, self._pod = labels, pod
        self._namespace = namespace or config.namespace
        self._client = AsyncClient(config, self._namespace, httpx2.Timeout(_PATIENCE_S))
        self._leads = dict.fromkeys(labels, False)
        self._shown: dict[str, bool | None] = dict.fromkeys(labels)
        """What the pod says; None = not known, as at the start, when a former process may have left it."""
        self._changed = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None

    def note(self, transition: Transition) -> None:
        """A term of this server begins or ends."""
        if transition.election_id in self._leads and transition.kind in ("elected", "ended"):
            self._leads[transition.election_id] = transition.kind == "elected"
            self._changed.set()

    async def start(self) -> None:
        if self._keeping is None:
            self._changed.set()
            self._keeping = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Its terms have ended; their labels go, if that can be done soon."""
        keeping, self._keeping = self._keeping, None
        if keeping is None:
            return
        keeping.cancel()
        await asyncio.wait({keeping})
        self._leads = dict.fromkeys(self._leads, False)
        with contextlib.suppress(*_FAILURES):
            async with asyncio.timeout(_PATIENCE_S):
                await self._show()
        await self._client.close()

    async def _keep(self) -> None:
        failures = 0
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._show()
                failures = 0
            except _FAILURES as error:
                if not failures:
                    log.warning("cannot label pod %s: %s; it is tried again", self._pod, error or type(error).__name__)
                await asyncio.sleep(_AGAIN_S[min(failures, len(_AGAIN_S) - 1)])
                failures += 1
                self._changed.set()

    async def _show(self) -> None:
        """Makes the pod say what is so."""
        for election_id, leads in list(self._leads.items()):
            if self._shown[election_id] is leads:
                continue
            self._shown[election_id] = None
            key = self._labels[election_id]
            if leads:
                await self._take_from_others(key)
            await self._patch(self._pod, key, VALUE if leads else None)
            self._shown[election_id] = leads

    async def _take_from_others(self, key: str) -> None:
        selector: Any = {key: VALUE}
        names = [pod.metadata.name async for pod in self._client.list(Pod, labels=selector) if pod.metadata]
        for name in names:
            if name and name != self._pod:
                log.info("pod %s does not lead any more: its label %s goes", name, key)
                await self._patch(name, key, None)

    async def _patch(self, pod: str, key: str, value: str | None) -> None:
        body = {"metadata": {"labels": {key: value}}}
        async with asyncio.timeout(_PATIENCE_S):
            await self._client.patch(Pod, pod, body, patch_type=PatchType.MERGE)
