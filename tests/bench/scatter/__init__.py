"""The benchmark of scatter/gather: what a root costs for each leaf, and what it does about slow leaves and overload.

How it is measured
------------------

Roots run on core 0, all leaves and the load generator, both in Go, on core 1, so that the root is the limit; figures
of roots beside each other come from one run, in turns of a second each. A reply is as long as the question, 100 bytes,
where nothing else is said. CPU is what the kernel counts for the threads of a process; for the root that is everything:
its own RPC, the calls to the leaves, the merge (`concat`).

The bare loop (`bare.py`) is the least that a root in grpc.aio can be: a handler that calls every leaf with the bytes
that came and joins what comes back, with the same tuning as our server. The root on Node (`root.mjs`) does the same
with grpc-js. `retinue, stream` asks each endpoint over one stream (`transport: stream`) instead of by calls.

Slow leaves sleep, and those that serve one query after the other have a queue, so that more calls do make them slower.
Extra calls are counted by the leaves themselves: queries that came, above one for each shard of each request.

Overload is an open loop at three times what the same root answered in a closed one just before. Goodput is answers
per second, and a rejection is timed at the caller. Meanwhile health is asked every 20 ms, so that it shows how long the
root's event loop makes others wait.
"""
