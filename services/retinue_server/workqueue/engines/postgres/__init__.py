"""PostgreSQL: for those who outgrow one machine. Many coordinators on one database.

Steps run in a few writer threads, each with one connection. A thread takes all steps that wait, runs them in one
transaction and answers after its commit, as SQLite's does; READ COMMITTED, and every row that a step reads is locked
until then. Steps of different threads and coordinators so wait for each other where they meet in a task, and pass each
other by (SKIP LOCKED) where they look for any. When another transaction was faster (a key taken, a deadlock), the group
runs again, then one by one: steps are functions of what they read, so that nobody notices.

Queues are known by heart: every group holds a shared lock on them all, and a step that changes one runs alone.
"""

from retinue_server.workqueue.engines.postgres.engine import PostgresEngine

__all__ = ["PostgresEngine"]
