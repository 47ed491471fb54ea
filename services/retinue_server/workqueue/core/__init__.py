"""The rules of the work queue: no I/O, no wire, no SQL.

`rules.py` says what becomes of a task (pure functions of rows), `steps.py` what one atomic step does to the store,
`limits.py` what a request may hold, `waiting.py` and `events.py` who is told, and `queue.py` is the face that
`service.py` calls.
"""
