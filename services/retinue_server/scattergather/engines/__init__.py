"""Adapters of the ports: calls to leaves, and discovery."""
