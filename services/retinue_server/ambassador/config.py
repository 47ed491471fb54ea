"""The settings of the ambassador (`ambassador:` in the file, RETINUE_AMBASSADOR__… in the environment).

Upstreams stand in a file of their own, which is read again when it changes: see `upstreamfile.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec


class EnvoySettings(msgspec.Struct, frozen=True, kw_only=True):
    """How Envoy is found, and how it dials us."""

    mode: Literal["child", "attach"] = "child"
    """child: this server starts one. attach: one beside it, of a container of its own, dials `socket`."""
    path: Path | None = None
    """The program; None = `envoy` on the PATH, then the one of the extra `envoy`."""
    socket: Path | None = None
    """Where Envoy gets its configuration; None = DATA_DIR/ambassador/xds.sock. Envoy's admin.sock is beside it."""
    concurrency: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """Worker threads of a child."""


class EndpointSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Which addresses may be dialled."""

    allow: tuple[str, ...] = ()
    """Exceptions from what is forbidden (loopback, link-local and metadata addresses): `CIDR[:PORT[-PORT]]`, or
    `unix:/PATH` (those beneath it, if it ends in a slash)."""
    only: tuple[str, ...] = ()
    """If any are given, everything else is forbidden, too."""


class KubernetesSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How `kubernetes` discovery reaches the API server."""

    kubeconfig: Path | None = None
    """None = by the pod's service account."""
    namespace: str = ""
    """Where Services are that name none; empty = the pod's own."""


class AmbassadorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator may set."""

    upstreams: Path | None = None
    """The file of upstreams; None = DATA_DIR/ambassador/upstreams.yaml. While there is none, RPCs alone declare."""
    allow_override: bool = False
    """Lets RPCs change what the file declares, until the file changes."""
    data_plane: Literal["auto", "envoy", "native"] = "auto"
    """auto: Envoy where it is found, and native for the rest. envoy: no start without it. native: never Envoy."""
    envoy: EnvoySettings = EnvoySettings()
    endpoints: EndpointSettings = EndpointSettings()
    standalone: tuple[str, ...] = ()
    """`NAME=HOST:PORT`, for development: this server stands in for all that the upstream's discovery would find, in
    plaintext and unsharded. Loopback is allowed for it."""
    max_upstreams: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 64
    """How many there may be."""
    kubernetes: KubernetesSettings = KubernetesSettings()
    env_file: Path | None = None
    """A file that is kept up to date with `RETINUE_UPSTREAM_<NAME>_ADDRESS=…` lines, for apps to source."""
