"""The benchmark of leader election: how long nobody leads, and what leading costs, beside what people use today.

How it is measured
------------------

Servers are processes, engines are real and at their own defaults (fsync on), and all share the machine's cores with the
bench. A hand-over is timed where it matters: from just before the leader's last act (`resign` is written, SIGKILL is
sent) to the moment the next candidate's process has read `elected`. Both candidates are on different servers that share
nothing but the engine. Candidates of Retinue are Python, those of etcd's Election API and of client-go are Go.

Every round plays each engine and each peer once, in an order that turns; figures are medians over the rounds with their
range. Where Retinue is compared with direct calls of etcd, the calls alternate one by one.

What client-go writes is arithmetic: its defaults renew every two seconds, which is half a row and half a commit per
election and second. What Retinue writes is counted by the engine: PostgreSQL's statistics, etcd's revision and raft
index, and for SQLite the rows whose deadline has moved and the fsyncs of the server.
"""
