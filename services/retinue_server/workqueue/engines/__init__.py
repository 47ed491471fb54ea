"""One adapter a file, imported by name when it is chosen."""
