"""Who serves a name: finders that patterns share. Each is a part of the process whose `watch` tells of every change."""
