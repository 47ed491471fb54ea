"""The worker process as the core sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinue_server.adapter.engine import Answer, SourceError
from retinue_server.adapter.engines.working import WorkerGone, Working
from retinue_server.adapter.worker import Declare, Forget, Question, Response, Take, Taken, Tried, Try

if TYPE_CHECKING:
    from collections.abc import Callable

    from retinue_server.adapter.core.packs import Pack
    from retinue_server.adapter.core.points import RawFamily
    from retinue_server.adapter.core.spec import Spec


class ProcessWork:
    """A part: declares, asks, and starts it again when it is gone."""

    def __init__(self) -> None:
        self._declared: dict[str, Declare] = {}
        self.working = Working(lambda: self._declared)

    async def start(self) -> None:
        await self.working.start()

    async def stop(self) -> None:
        await self.working.stop()

    def declare(self, spec: Spec, pack: Pack | None) -> None:
        told = _declared(spec, pack)
        self._declared[spec.target_id] = told
        self.working.tell(told)

    def forget(self, target_id: str) -> None:
        self._declared.pop(target_id, None)
        self.working.tell(Forget(target_id))

    async def take(self, target_id: str, answer: Answer | list[RawFamily], now_ms: int) -> Taken:
        """Raises SourceError if the worker went away meanwhile."""
        if isinstance(answer, Answer):
            said, families = answer, None
        else:
            said, families = Answer(), answer
        taken = await self._ask(
            lambda number: Take(number, target_id, said.text, said.content_type, said.document, families, now_ms)
        )
        assert isinstance(taken, Taken)
        return taken

    async def try_out(self, spec: Spec, pack: Pack | None, answer: Answer) -> Tried:
        """What would become of it; raises as `take`."""
        declared = _declared(spec, pack)
        tried = await self._ask(lambda number: Try(number, declared, answer.text, answer.content_type, answer.document))
        assert isinstance(tried, Tried)
        return tried

    async def _ask(self, make: Callable[[int], Question]) -> Response:
        try:
            return await self.working.ask(make)
        except WorkerGone:
            raise SourceError("the worker process ended meanwhile; it is started again") from None


def _declared(spec: Spec, pack: Pack | None) -> Declare:
    return Declare(spec.target_id, spec.own_labels, spec.limits, pack)
