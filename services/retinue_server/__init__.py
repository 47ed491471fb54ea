"""The reference servers of Retinue: the container design patterns as small gRPC services.

One folder a pattern, each with the same entries; `runtime` is what they share and knows none of them.
"""

__version__ = "0.1.0"
