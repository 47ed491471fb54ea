"""Stores of elections; each is loaded when it is chosen."""
