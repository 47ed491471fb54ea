"""Scatter/gather: one request to many leaves, one answer back, and the truth about what is missing.

A request goes `service.py` (translate) -> `core/root.py` (pools, admission) -> `core/scatter.py` (one request) ->
`engines/` (calls to leaves). Whom there is to ask comes the other way: `poolfile.py` says which shards are expected,
and `poolwatch.py` when that changes; `runtime/discovery` who serves them; `core/root.py` makes a topology of both.

States of a shard in a request
------------------------------

    UNSENT -> ASKED -> ANSWERED            a reply was taken; whatever else was under way for it is cancelled
                 |---> ASKED               another attempt: a hedge beside a slow one, a retry after one that failed
                 |---> FAILED              nobody is left to ask, or may be asked
    any     -> GIVEN UP                    the answer was given without it, or the request ended

A request ends once, by the first of: every shard answered or failed; the minimum can't be met any more; `first_k`, or
the soft deadline, with the minimum met; a leaf's refusal of the request itself; the byte budget; the deadline; the
caller's leaving.

Guarantees
----------

G1  Each selected shard reaches the merge at most once, whatever hedges and retries did.
G2  `complete` if and only if every selected shard answered, and completely.
G3  Never OK with no answer at all, unless the minimum is explicitly 0.
G4  Leaves run at least once. Pools that are not idempotent get no hedge, no retry after a request may have reached a
    leaf, and no partial answers.
G5  One topology snapshot per request.
G6  Every outstanding attempt is cancelled when the request ends, whatever ends it.
G7  A deadline always exists (the pool's), and it is shorter on each level of a tree.
G8  What is gathered never exceeds admitted requests times the byte budget.

Who owns the clock: this process's monotonic clock alone. Leaves are told durations (`grpc-timeout`), and the root
does not rely on their keeping them: its own timer ends every attempt.

What each failure does
----------------------

Leaf refuses, resets, is gone: another replica, once for each, out of the pool's budget. Leaf hangs or stalls: a hedge
to another replica after the pool's usual latency, out of the same budget; without one, the deadline. A replica that
fails is charged what it kept waiting, so that failing fast attracts nobody. Leaf answers nonsense, or too much: as if
it had failed. All replicas of a shard gone: the shard is missing, at once; it stays expected. Leaf overloaded
(RESOURCE_EXHAUSTED): the shard is missing; asking more would feed the overload. Many slow leaves: the budget (a
twentieth of the calls, 50 at once) ends hedging before it doubles the load. Too many requests: refused as a whole,
before the first leaf is asked. Caller leaves: all its attempts are cancelled. Pool file broken, gone or still being
written: the last good one counts, and the log and a metric say so. Discovery away: the endpoints found last stay;
only an answer that there are none leaves a shard without. New certificates that don't work: the connections that do
stay. Root dies: its requests fail; nothing is stored, nothing need be recovered. Late replies of losers: the call was
cancelled; nobody listens."""
