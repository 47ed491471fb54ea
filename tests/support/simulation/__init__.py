"""A world that one seed decides: time, the order of ready callbacks, the network, crashes, what every client does.

    chance.py    the seed's random numbers, in words
    loop.py      an event loop without real time, threads or I/O; nodes that can be stalled and killed
    clocks.py    a wall clock that jumps, boot clocks that don't
    network.py   calls between nodes that are delayed, lost, doubled, cut; partitions
    records.py   what happened, append-only: the history that invariants are read off, and the trace that people read

It knows no pattern: what is served, called and claimed stands beside it (`support/workqueue_simulation`). After
FoundationDB's simulator (Zhou et al., SIGMOD 2021, section 4) and its swarm testing (Groce et al., ISSTA 2012): each
seed turns on its own choice of faults, so that none of them hides another.
"""
