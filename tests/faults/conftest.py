"""Faults are played against the same servers as the contract suite's."""

from contract.conftest import serve

__all__ = ["serve"]
