"""Retinue's clients: the generated stubs (`retinue.<pattern>.v1`), hand-written helpers (`retinue.client`), the command."""
