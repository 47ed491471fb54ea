"""Adapters of the ports: data planes, and discovery."""
