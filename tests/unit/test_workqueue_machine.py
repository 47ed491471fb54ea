"""Random stories on the memory engine keep the guarantees; see support/workqueue_machine.py."""

from __future__ import annotations

from hypothesis import settings
from support.workqueue_machine import QueueMachine

from retinue_server.workqueue.engine import Engine
from retinue_server.workqueue.engines.memory import MemoryEngine


class MemoryMachine(QueueMachine):
    def engines(self) -> list[Engine]:
        return [MemoryEngine()]


MemoryMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestMemoryMachine = MemoryMachine.TestCase
