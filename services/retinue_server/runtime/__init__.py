"""What every server shares and what knows no pattern: listeners, authority, errors, limits, telemetry, life.

A call takes this way: listener (`server.py`, `http.py`) -> `dispatch.py`, which wraps each method once, when it is
registered, with what `interceptors.py` offers -> the pattern's `service.py`. A pattern hands itself over as a
`dispatch.Pattern`; the runtime starts its parts in order, serves its services and stops the parts in reverse.
"""
