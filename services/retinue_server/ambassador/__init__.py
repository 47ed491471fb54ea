"""The ambassador: the app talks to localhost; sharding, discovery, splitting, retries and protection happen beside it.

A declaration goes `service.py` (translate) -> `core/upstreams.py` (what is declared, and what has become of it) ->
`engines/` (a data plane that carries the bytes). Declarations come by RPC and from a file (`upstreamfile.py`). Who
serves comes the other way: discovery finds addresses, `runtime/endpoints.py` says which of them may be dialled, and
the data plane gets what is left.

States of an upstream
---------------------

    PENDING  -> ACTIVE               the data plane has taken all of it, and the listener accepts
            |-> REJECTED             the data plane refused it; another declaration tries again
    ACTIVE   -> ACTIVE               a change is served; or refused: `rejection` says why, the former is served
    any      -> DRAINING -> gone     no new connections; after the last, or when the time is over, it is removed
    DRAINING -> as declared          by another declaration

Guarantees
----------

G1  An ACTIVE upstream accepts at its address, which does not change while it exists.
G2  A refused declaration changes nothing of what is served.
G3  What a data plane can't do is UNIMPLEMENTED by name, never done by halves.
G4  No connection to an address that the endpoint policy forbids; addresses are checked, not names, after every look-up.
G5  Changes of endpoints, weights, policies and certificates cost no request.
G6  An Envoy goes on while this server is away, and a new server with the same declarations changes nothing.

Who owns the clock: this process's monotonic clock for waits and drains; Envoy its own for what it was told.

What each failure does
----------------------

Endpoint down: the policy's outlier detection and health checks keep it off; without them its share of calls fails.
All down: HTTP 503, gRPC UNAVAILABLE, Redis and memcached an error each, TCP a connection that is closed at once.
Discovery away: who was found last stands. A name that resolves to a forbidden address: that address is left out,
and the log says so; a name with no other address leaves the upstream without endpoints. Data plane refuses: see the
states. Envoy dies: it is started again, and gets everything anew; its listeners are gone meanwhile (under a
second). This server dies: an Envoy that was attached goes on; a child ends with its parent; native upstreams end.
A file of certificates or passwords turns bad: what stood there before goes on, and nothing else waits for it. SIGTERM:
nobody is accepted any more, and requests that are under way are answered.
File broken: what was declared last stands, and the log and a metric say so; at start the server refuses. Port held
by somebody else: FAILED_PRECONDITION, and nothing is declared.
"""
