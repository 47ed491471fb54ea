"""The server with one rule broken, named in DEFECT: what the checkers of histories must catch.

The rules are broken from here, so that the product has no switch for it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

from msgspec.structs import replace

from retinue_server.__main__ import main
from retinue_server.workqueue.core import rules, steps
from retinue_server.workqueue.core.queue import WorkQueue
from retinue_server.workqueue.engine import TaskRow

_LATE_S = 0.3


def acknowledge_before_commit() -> None:
    """Enqueueing is answered at once and done a little later."""
    enqueue = WorkQueue.enqueue
    under_way: set[asyncio.Task[Any]] = set()

    async def later(queue: WorkQueue, asked: Any) -> None:
        await asyncio.sleep(_LATE_S)
        await enqueue(queue, asked)

    async def answer(queue: WorkQueue, asked: Any, _: Sequence[Any] = ()) -> list[steps.Enqueued]:
        writing = asyncio.create_task(later(queue, asked))
        under_way.add(writing)
        writing.add_done_callback(under_way.discard)
        return [steps.Enqueued(task.task_id) for task in asked.tasks]

    patch.object(WorkQueue, "enqueue", answer).start()


def accept_a_stale_completion() -> None:
    """Whether the token is that of the present lease is not looked at."""
    patch.object(rules, "holds", lambda row, *_: row is not None).start()


def refund_twice() -> None:
    """A release gives back two attempts."""
    release = rules.released

    def released(row: TaskRow, *arguments: Any) -> TaskRow:
        after = release(row, *arguments)
        return replace(after, attempt=after.attempt - 1)

    patch.object(rules, "released", released).start()


DEFECTS: dict[str, Callable[[], None]] = {
    one.__name__: one for one in (acknowledge_before_commit, accept_a_stale_completion, refund_twice)
}

if __name__ == "__main__":
    DEFECTS[os.environ["DEFECT"]]()
    sys.exit(main())
