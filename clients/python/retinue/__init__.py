"""Retinue's clients.

The generated stubs (`retinue.<pattern>.v1`), hand-written helpers (`retinue.client`), the command.
"""
