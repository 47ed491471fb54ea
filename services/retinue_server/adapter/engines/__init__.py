"""Ways of asking apps, one a file."""
