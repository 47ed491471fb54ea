"""The adapter: one monitoring interface for apps of any kind.

A collection goes `core/targets.py` (when) -> `engines/` (how an app is asked) -> the worker process (`worker.py`:
parse, `core/packs.py`: what it means, `core/collection.py`: what of it is taken) -> what is shown. Reading
(`service.py`, `/metrics`) takes what is shown and asks nobody.

States of a target
------------------

    PENDING  -> UP                    a collection succeeded, and all of it was taken
             |-> DEGRADED             some points were refused; `rejections` says why
             |-> LIMITED              more came than the limits allow
    these    -> STALE                 it failed; what was collected before stands
    STALE    -> DOWN                  for `stale_intervals`: nothing of it is shown any more
    any      -> MISCONFIGURED         it answers what its kind does not answer

Guarantees
----------

G1  One collection of a target at a time, on our schedule: no reader makes an app work.
G2  A bad point costs one point, a bad target nothing of another; each refusal is counted with its reason.
G3  `/metrics` is valid whatever sources say: no series twice, no family in two pieces, base units, reserved labels.
G4  What a source does not have is absent with a reason, never zero.
G5  No address that the endpoint policy forbids is dialled; addresses are checked, not names, after every look-up.

Who owns the clock: this process's monotonic clock for schedules, its wall clock for what people read.

What each failure does
----------------------

App slow: its timeout ends the collection; no other target waits. App down: STALE, then DOWN. App says nonsense:
MISCONFIGURED, and what was there stands. App says too much: known series stay, new ones are left out (LIMITED). Two
apps say different things by one name: who came first has it, the other's points are refused. Counter falls: a reset,
since then it counts anew. Worker dies, or is silent for five minutes and is ended: the next collection starts
another; counters begin anew. A page of 64 MiB: its own target waits, those of others are read between (threads of the
worker share the processor). Rule pack broken: the last good one stands, the log says so; at start the server refuses.
StatsD comes too fast: the kernel drops datagrams, and how many is told.
"""
