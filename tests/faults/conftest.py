"""Faults are played against the same servers as the contract suite's."""

from contract.conftest import serve
from faults.tables import pytest_terminal_summary, row

__all__ = ["pytest_terminal_summary", "row", "serve"]
