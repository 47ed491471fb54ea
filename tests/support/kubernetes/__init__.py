"""A private Kubernetes for tests: the real kube-apiserver on the real etcd, without nodes.

`build.py` makes both from their published Go modules, once; `server.py` runs them.
"""

from support.kubernetes.server import Cluster, Kubernetes, shared

__all__ = ["Cluster", "Kubernetes", "shared"]
