"""PostgreSQL: one row for each election, and no lock that outlives a statement.

Each method of the port is one statement and one transaction, so that a pooler may give each another connection. The
database decides who was first; whether a lease is over is for the candidate to judge, who must have seen the row
unchanged for all of it, so no clock of the database counts. A token is the row's epoch, which rises in the statement
that takes the election; its domain is that of the cluster, its timeline and the table.

Servers hear of each other's changes by NOTIFY, which comes with the change; renewals are not told. News is a hint: who
misses it finds the change when it looks again.

`engine.py` is the port, `statements.sql` what it sends, `pool.py` the connections and their patience, `news.py` what is
heard, `migrate.py` the schema. Tested against PostgreSQL 15 and PgBouncer.
"""

from retinue_server.leaderelection.engines.postgres.engine import PostgresEngine

__all__ = ["PostgresEngine"]
