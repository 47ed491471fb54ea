"""Faults played against real processes, from a seed."""
