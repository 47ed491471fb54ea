"""Kubernetes: one Lease (coordination.k8s.io/v1) for each election, read with GET, written with PUT of what was read.

The API server refuses a PUT of what is no longer the latest, so of two who want to change a Lease one starts again. It
does not judge leases: a candidate takes over what it has itself seen unchanged for the whole of its lease. So do the
elections of client-go, which may take part: what they need is in the spec, what Retinue needs beyond is in annotations.
The token is a counter of its own there, since leaseTransitions does not rise when the same identity leads again. Its
domain is the uid of the Lease.

Changes are watched, not polled. `lease.py` is what a Lease says and becomes, `client.py` how it is fetched and stored,
`engine.py` the port.
"""

from retinue_server.leaderelection.engines.kubernetes.engine import KubernetesEngine

__all__ = ["KubernetesEngine"]
