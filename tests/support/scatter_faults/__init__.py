"""Faults of scatter/gather: a real root between callers and leaves, all of which write down what they ask and say."""
