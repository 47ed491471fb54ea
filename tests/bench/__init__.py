"""The scoreboard: what Retinue costs and how fast it is, beside its peers, in one run on one machine.

How it is measured
------------------

Systems are interleaved: every round plays every system once, in an order that turns from round to round, so that what
disturbs the machine disturbs all. Figures are medians over the rounds with their range; a ratio is taken within each
round first, then its median. Rates on a shared machine move; ratios and CPU per task are what to trust.

A system is an adapter: one small program per peer (`adapters/`), tuned as the peer's own documentation says, that is
run twice. `produce` takes commands as JSON lines and enqueues; `work` runs the peer's own worker with a handler that
notes which task it was and when. The server is pinned to core 0, producer and worker to core 1, unless a cell says
otherwise; each peer has a server of its own, and they never work at the same time.

Delivery is checked, not assumed: every task carries its number, the worker writes down all it handled, and after the
last one the peer's own store must say that nothing is left. A round in which a task is missing, foreign or handled
twice voids the cell. (At least once is what most of them promise; without a fault nothing may be handled twice.)

CPU is user + system time of the whole process tree; of the server it is read from /proc around the round, of the
worker it is what the process itself used between its first and its last task, so that starting up is not counted.
Bytes are the server's `write_bytes`, fsyncs are counted by a preloaded shim (`syncs.c`) that costs one atomic add.

Durability tiers are never mixed. D2 is an fsync before every acknowledgement: redis `appendfsync always`, beanstalkd
`-f0`, PostgreSQL `fsync=on synchronous_commit=on`, Retinue on SQLite (`synchronous=FULL`).
"""
