"""What the fault tests measured, printed as tables at the end of the run (`make faults`; LONG=1 plays more)."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable

import pytest

LONG = bool(os.environ.get("LONG"))
PATIENT = pytest.mark.timeout(3_600 if LONG else 600)
"""For modules whose tests play more when they may."""
Row = Callable[..., None]


@pytest.fixture
def row(record_property: Callable[[str, object], None]) -> Row:
    """Adds a row to a table: its title, then the cells by column."""

    def add(title: str, **cells: object) -> None:
        record_property(f"table {title}", {name: str(value) for name, value in cells.items()})

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tables: dict[str, list[dict[str, str]]] = defaultdict(list)
    for report in terminalreporter.stats.get("passed", []):
        for name, cells in report.user_properties:
            if name.startswith("table "):
                tables[name.removeprefix("table ")].append(cells)
    for title, rows in tables.items():
        terminalreporter.write_sep("-", title)
        for line in _lines(rows):
            terminalreporter.write_line(line)


def _lines(rows: list[dict[str, str]]) -> list[str]:
    columns = {name: max([len(name), *(len(row.get(name, "")) for row in rows)]) for row in rows for name in row}
    heads = {name: name.replace("_", " ") for name in columns}
    return [" | ".join(row.get(name, "").ljust(width) for name, width in columns.items()) for row in (heads, *rows)]
