"""The settings of scatter/gather (`scattergather:` in the file, RETINUE_SCATTERGATHER__… in the environment).

Pools stand in a file of their own, which is read again when it changes: see `poolfile.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec


class KubernetesSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How sources `kubernetes:SERVICE:PORT` are found."""

    kubeconfig: Path | None = None
    """How to reach the API server; None = by the pod's service account."""
    namespace: str = ""
    """Where Services are that name none (`kubernetes:SERVICE.NAMESPACE:PORT` does); empty = the pod's own."""


class ScatterGatherSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator may set."""

    pools: Path | None = None
    """The pool file; None = DATA_DIR/scattergather/pools.yaml. While there is none, there are no pools."""
    leaf_pool: str = ""
    """The pool that this root asks when it is a leaf of another root, which names none."""
    dns_poll_seconds: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 5.0
    """How often names of sources `dns:NAME:PORT` are looked up."""
    processes: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    """How many root processes share the load of these pools: limits and budgets are divided by it."""
    kubernetes: KubernetesSettings = KubernetesSettings()
