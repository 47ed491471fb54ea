"""What the core remembers is what is there, however much came and went before."""

from __future__ import annotations

import gc

from retinue_server.adapter.core.collection import Limits
from retinue_server.adapter.worker import Declare, Take, Worker

TURNS, SERIES = 3000, 4
FEW = 500
"""Objects: much less than a turn's, were they kept."""


def test_thousands_of_collections_of_series_that_come_and_go_leave_nothing_behind() -> None:
    worker = Worker()

    def turn(number: int) -> None:
        name = f"t{number % 3}"
        worker.told(Declare(name, {"target": name, "kind": "prometheus"}, Limits(), None))
        text = "".join(f'x_{number}_{n}{{id="{number}"}} 1\n' for n in range(SERIES)).encode()
        assert not getattr(worker.answer(Take(0, name, text, "text/plain", None, None, number)), "failure", "")

    def objects(turns: range) -> int:
        for number in turns:
            turn(number)
        gc.collect()
        return len(gc.get_objects())

    before = objects(range(TURNS // 3))
    assert objects(range(TURNS // 3, TURNS)) < before + FEW
