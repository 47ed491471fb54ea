"""A private Kubernetes for tests: the real kube-apiserver on the real etcd, without nodes; or its Leases, emulated.

`build.py` makes both programs from their published Go modules, once; `server.py` runs them. `emulator.py` is for where
they are not built. `transcript.py` holds it to the real one.
"""

from support.kubernetes.api import Api
from support.kubernetes.emulator import Emulator, emulated
from support.kubernetes.server import Cluster, Kubernetes, shared

__all__ = ["Api", "Cluster", "Emulator", "Kubernetes", "emulated", "shared"]
