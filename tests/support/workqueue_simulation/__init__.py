"""The work queue in a simulated world: its real core on a simulated disk, clients that misbehave, and its guarantees.

engine.py      the Engine port over a disk that loses what was not synced, and the points where a server crashes
server.py      one incarnation after the other of the real WorkQueue and its sweeper
clients.py     producers, workers and operators that retry, stall, die and come back late
history.py     what the disk adds to the history: each change of a row as it became durable
model.py       the guarantees as a model that is told the history, record by record, and says what broke them
schedule.py    one seed's world, from its first call to the last check
"""
