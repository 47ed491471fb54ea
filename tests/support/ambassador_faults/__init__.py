"""Faults of the ambassador: real data planes between callers and servers; callers write down what they ask and hear."""
