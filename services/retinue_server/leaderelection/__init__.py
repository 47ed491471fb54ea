"""Leader election: an app is leader with a token that a database can check, and stops being it before another can be.

A request goes `service.py` (translate) -> `core/elections.py` (sessions and who stands for what) -> `core/contest.py`
(one election) -> `engines/` (the store that decides). The arithmetic of deadlines stands in `core/rules.py`.

Guarantees
----------

G1  Tokens strictly increase per election within a token domain.
G2  At most one app holds an unexpired deadline at any instant, if helpers obey the deadline, the engine is linearizable
    and clock rates differ by less than the guard (a tenth). Clock offset and steps are irrelevant.
G3  Nothing more. A check followed by an effect can be delayed without bound, so whatever is protected must refuse
    tokens lower than the highest it has seen.

Outside G2, because the client asked for it: LIVENESS_STREAM (the open RPC counts, the app knows no deadline) and
ON_DISCONNECT_RELEASE (the client promises fencing).

Two leases
----------

The server holds the engine's lease (15 s) and renews it every third of its length. The app holds a short lease (2 s)
inside it, renewed by heartbeats over localhost. So the app's death costs 2 s, or milliseconds with proof, and the
engine sees a write per election every 5 s.

    engine's   valid until  stamp before the renewal was sent + lease, less a tenth
    app's      valid until  stamp before the heartbeat was sent + what the server told, which is the smaller of the
                            app's lease and what is left of the engine's, both counted from when the server read that
                            heartbeat, less a tenth

The server gives the election away only after the last deadline that it told is over (without the tenth), or when the
app said that its work has stopped, or is proven dead.

Clocks
------

Deadlines live on the boot clock (CLOCK_BOOTTIME: never stepped, counts suspended time), each on that of its owner: the
app's on its own, the server's on its own; only durations travel. Who judges whether a foreign lease is over:

    memory, sqlite   the engine: all servers share one kernel and its boot clock. A record of an earlier boot, or of
                     another time namespace, is watched instead
    etcd             etcd's leader
    postgres, kubernetes, and the exception above
                     the candidate: it takes over what it has itself seen unchanged for the record's whole lease, on
                     its own boot clock. Stored times are for people

States of a session: STANDBY -> LEADER <-> AT_RISK -> STANDBY or gone. The first step is taken only when the engine
has confirmed it; a claim whose outcome is unknown is asked again (the engine knows its own session), a renewal whose
outcome is unknown leaves the old deadline.

What each failure does
----------------------

App dies: its stream ends, which is no proof; nothing more is granted, and when what was granted is over (2 s) the
election is released. With a proof file (an flock that the kernel frees only when every process that has it is gone) it
is released as soon as the lock is free. App hangs, is stopped or swapped: no heartbeats, the same. Stream lost, app
alive: it resumes its session, same term and token. Server dies: the app can renew nothing and stops at its deadline;
others take over when the engine's lease is over. Server is stopped: apps are told, resign, and the next takes over at
once. Engine away: leaders are AT_RISK and go on until the engine's lease would be over, then they stop; nobody can take
over meanwhile, and everything recovers by itself. Host or network gone: the engine's lease runs out. Late writes of
a dead leader: only the token, or `release_delay`, keeps them out. Engine restored from a backup: tokens may repeat
unless it has a new domain; deploy/leaderelection says which engine does what.
"""
