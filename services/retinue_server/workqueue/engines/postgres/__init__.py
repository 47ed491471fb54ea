"""PostgreSQL: for those who outgrow one machine. Many coordinators on one database.

Steps run in a few writer threads, each with one connection. A thread takes all steps that wait, runs them in one
transaction and answers after its commit, as SQLite's does; READ COMMITTED, and every row that a step reads is locked
until then. Steps of different threads and coordinators so wait for each other where they meet in a task, and pass each
other by (SKIP LOCKED) where they look for any. Two things are taken for granted at first: that the leases granted here
are still as they were written, and that a request is no repeated one. What is written depends on it, so that the
database undoes the transaction where it is not so. When that happens or another transaction was faster (a key taken, a
deadlock), the group runs again and reads all it goes by, then one by one: steps are functions of what they read, so
that nobody notices.

Queues are known by heart: every group holds a shared lock on them all, and a step that changes one runs alone.

The clock is the database's; where this differs from SQLite stands in services/decisions/0007. Each file here has one
idea: `engine.py` the threads, and what to do when another coordinator or the network comes between; `store.py` what
steps see; `statements.sql` what they send; `leases.py` what need not be read; `marks.py` where scans begin; `days.py`
how history goes; `news.py` how coordinators hear of each other; `blobs.py` where large content is.

Tested against PostgreSQL 15 and PgBouncer. Databases that speak its protocol (CockroachDB, YugabyteDB) are not tested,
and lack some of what this needs (LISTEN, advisory locks, SKIP LOCKED in all places).
"""

from retinue_server.workqueue.engines.postgres.engine import PostgresEngine

__all__ = ["PostgresEngine"]
