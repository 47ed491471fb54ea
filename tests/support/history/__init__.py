"""A history: what processes asked of a work queue and what they were told, with the faults that were played meanwhile.

Every process appends to a file of its own, one JSON line an event, a call before it is sent; the files are read
together afterwards. All times are nanoseconds of CLOCK_BOOTTIME, which the processes of one machine share and which
leases run on. Checkers (`checks.py`) are pure functions of a `Story`.
"""

from support.history.records import (
    Call,
    Event,
    Fault,
    Grant,
    Item,
    Leased,
    Op,
    Outcome,
    Reply,
    TaskRecord,
    decode,
    encode,
)
from support.history.story import Ending, Execution, Policy, Settlement, Story, Verdict, read, read_file

__all__ = [
    "Call",
    "Ending",
    "Event",
    "Execution",
    "Fault",
    "Grant",
    "Item",
    "Leased",
    "Op",
    "Outcome",
    "Policy",
    "Reply",
    "Settlement",
    "Story",
    "TaskRecord",
    "Verdict",
    "decode",
    "encode",
    "read",
    "read_file",
]
