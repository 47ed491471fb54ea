"""The work queue: a coordinator that keeps tasks, hands them out under leases and accepts each completion once.

A request goes `service.py` (translate) -> `core/queue.py` (check, one step, tell who waits) -> `engines/` (store).
What a step does stands in `core/steps.py`, what becomes of a single task in `core/rules.py`; both know no engine.

States
------

    SCHEDULED -> READY -> LEASED -> SUCCEEDED
                   ^        |-> RETRYING -> READY      failed, attempts left
                   |        |-> DEAD                   failed for good, or max_lease_expirations reached
                   |--------|-> READY, SCHEDULED       released (attempt refunded), or the lease expired (refunded too)
    any but a terminal one -> CANCELLED; SCHEDULED, READY, RETRYING -> EXPIRED
    DEAD, CANCELLED, EXPIRED -> READY                  redriven: counters start again, the epoch does not
    terminal -> gone                                   retention, delete, purge

`attempt` counts leases handed out less those refunded; `lease_expirations` counts apart; `lease_epoch` never
falls.

Guarantees
----------

G1  OK is sent only after the change is durable at the engine's level, which start-up, GetCapabilities and the
    trailer `retinue-durability` tell. (Group commit: callers are answered after the one commit that holds their
    steps.)
G2  Execution is at least once: a lease that ends without a completion puts the task back.
G3  At most one completion of a task is accepted: the token (task, epoch, nonce) is compared inside the step that
    stores state, result and follow-ups; all of them commit together or not at all.
G4  The same token with the same kind of outcome is answered OK again until the task is next leased, and the first
    result stands; `request_id` replays
    enqueueing (for an hour) and leases (while they live). Another outcome is ALREADY_FINALIZED, an ended lease
    LEASE_LOST.
G5  What is counted is derived: who has what is read off the LEASED rows, never kept beside them.
G6  Within a priority tasks start in the order they came, best effort: retries and releases keep their place.
G7  Only the server's clocks count. A worker need not know the time.

External effects are the handler's own: it gets the task's `lease_epoch` as a fencing token for what it writes to.

Clocks
------

Leases and attempts run on the boot clock (CLOCK_BOOTTIME: it never steps, and it counts suspended time); a lease
is over the millisecond its time is, swept or not. Schedules, expiry and retention run on the wall clock. A
restarted coordinator can't compare boot clocks: it gives every live lease one full term, uncounted; what is left
of an attempt it takes from the wall.

Many coordinators on one database (PostgreSQL) go by the database's clock alone, for wall times and leases; it outlives
them, so nothing is recovered at their start. What stepping it does stands in services/decisions/0007.

What each failure does
----------------------

Worker dies: its leases expire, the tasks are READY again; after three such leases a task is DEAD, so that one that
kills its workers stops. Worker hangs but renews: the attempt deadline ends the attempt as failed. Worker comes back
late: its token is refused, and it must not publish. Reply lost: repeat it (G4). Caller goes away while a lease is
being granted: the lease is released, the attempt refunded; under a request_id it waits to be asked for again until it
expires. Server dies: what was answered is on disk; what was not may be or not, and repeating tells. Disk nearly full:
what brings in new data (enqueueing, uploads) is refused with RESOURCE_EXHAUSTED (DISK_FULL) and changes nothing,
while leases, extensions, settlements with their results and follow-ups, sweeps and deletions go on in the reserve
(`disk_reserve_bytes`); it recovers when there is room, by deletion or from outside. Disk full to the last byte:
whatever does not fit is refused alike, nothing changed, the server lives on. A sync fails, in a commit, a checkpoint
or an upload: the process exits and does not try it again, since what is on disk is no longer known; the next start
reads the log anew and syncs it. Power lost: what was answered is on disk, what was not may be or not; names of files
are synced with their directories. Backup restored: the queue is as it was then. Tokens granted after the backup are
refused (LEASE_LOST), though task numbers and epochs are given out again: every lease call draws a nonce of 62 bits
from the system's randomness, so that a token fits a lease of another time with a chance of 2^-62. Leases of the
backup's own time live on. Engine away: UNAVAILABLE with RetryInfo, health NOT_SERVING, and it recovers by itself.
SIGTERM: long polls end empty, streams are told to drain, nothing new is leased.
"""
