"""Settings -> engine -> core -> servicer, by explicit constructors."""

from __future__ import annotations

import os
import re
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from retinue_server.leaderelection import journal, metrics, service
from retinue_server.leaderelection.config import LeaderElectionSettings, PostgresSettings
from retinue_server.leaderelection.core import limits
from retinue_server.leaderelection.core.elections import SERVER_ID_BYTES, Elections
from retinue_server.leaderelection.engine import Scope
from retinue_server.leaderelection.proof import Proofs
from retinue_server.runtime import tls
from retinue_server.runtime.config import ConfigError, UpstreamTls
from retinue_server.runtime.dispatch import Pattern, Service
from retinue_server.runtime.files import make_directory
from retinue_server.runtime.lifecycle import DataDirLock, fatal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from grpc import ChannelCredentials

    from retinue_server.leaderelection.config import EtcdSettings
    from retinue_server.leaderelection.core.requests import Transition
    from retinue_server.leaderelection.engine import Capabilities, Engine
    from retinue_server.leaderelection.podlabels import PodLabels
    from retinue_server.runtime.config import Settings, Upstream

SETTINGS = LeaderElectionSettings
NAME = "leaderelection"
_ENDPOINT = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
_LABEL = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
"""A key of a label, with its prefix or without."""
_REACH = {
    Scope.PROCESS: "within this process",
    Scope.HOST: "among the servers of this host that share the file",
    Scope.CLUSTER: "among all servers that share the engine",
}


async def wire(settings: Settings, section: LeaderElectionSettings) -> Pattern:
    """Leader election over its engine or, with an upstream, a relay."""
    if settings.upstream is not None:
        return _relay(settings.upstream)
    directory = settings.data_dir.absolute() / NAME
    engine = _engine(section, directory)
    _check_scope(engine.capabilities, section, os.environ, in_pod=_in_pod())
    labels = _pod_labels(section)
    elections = Elections(
        engine,
        names=section.elections,
        max_sessions=section.max_sessions,
        max_observers=section.max_observers,
        drain_ms=int(settings.drain_seconds * 1000),
        server_id=_server_id(directory),
        journal=partial(_tell, [journal.note, *(labels.note for labels in labels)]),
    )
    proofs = Proofs(section.proof_dir or directory / "proofs")
    make_directory(proofs.directory)
    defaults = service.Defaults(int(section.lease_seconds * 1000), int(section.app_lease_seconds * 1000))
    servicer = service.LeaderElectionService(elections, defaults, proofs)
    return Pattern(
        name=NAME,
        services=(Service(service.DESCRIPTOR, servicer, service.ROLES),),
        parts=(DataDirLock(directory), engine, *labels, elections),
        health=elections,
        quiesce=elections.quiesce,
        pages={"leader": servicer.page},
        metrics=partial(metrics.families, elections),
        notices=lambda: [f"engine {engine.capabilities.engine}: elects {_REACH[engine.capabilities.scope]}"],
    )


def _tell(listeners: Sequence[Callable[[Transition], None]], transition: Transition) -> None:
    for listener in listeners:
        listener(transition)


def _pod_labels(section: LeaderElectionSettings) -> Sequence[PodLabels]:
    """One or none."""
    if not section.pod_labels:
        return ()
    try:
        from retinue_server.leaderelection.podlabels import PodLabels  # noqa: PLC0415 - where it is asked for
    except ImportError as error:
        raise ConfigError(
            "cannot use leaderelection.pod_labels: install it with pip install 'retinue-server[kubernetes]'"
        ) from error
    labels = dict(text.partition("=")[::2] for text in section.pod_labels)
    for election_id, label in labels.items():
        if not limits.IDENTIFIER.fullmatch(election_id) or not _LABEL.fullmatch(label):
            raise ConfigError(f"cannot use leaderelection.pod_labels: {election_id}={label} is not ELECTION=LABEL")
    said = section.kubernetes
    return (PodLabels(labels, section.pod_name or socket.gethostname(), said.kubeconfig, said.namespace),)


def _in_pod() -> bool:
    return Path("/var/run/secrets/kubernetes.io/serviceaccount").exists()


def _check_scope(
    can: Capabilities, section: LeaderElectionSettings, environment: Mapping[str, str], *, in_pod: bool
) -> None:
    """Three replicas with defaults must not have three leaders."""
    pods = in_pod or "KUBERNETES_SERVICE_HOST" in environment
    if pods and can.scope is not Scope.CLUSTER and section.scope != "pod":
        raise ConfigError(
            f"cannot elect with engine {can.engine} in a pod: it reaches no other pod, so each replica would lead; "
            "choose leaderelection.engine etcd, kubernetes or postgres, "
            "or say leaderelection.scope: pod if one leader per pod is meant; "
            "to serve no elections, name the patterns that are to be served"
        )


def _relay(upstream: Upstream) -> Pattern:
    from retinue_server.runtime.relay import RelayServicer, UpstreamChannel  # noqa: PLC0415 - relays only

    channel = UpstreamChannel(upstream)
    return Pattern(
        name=NAME,
        services=[Service(service.DESCRIPTOR, RelayServicer(service.DESCRIPTOR, channel))],
        parts=(channel,),
        health=channel,
        notices=lambda: [f"relays to {upstream.address}"],
    )


def _server_id(directory: Path) -> str:
    """The same for every process that has this directory, one after the other."""
    make_directory(directory)
    path = directory / "server-id"
    if not path.exists():
        path.write_text(os.urandom(SERVER_ID_BYTES).hex())
    return path.read_text().strip()


def _engine(section: LeaderElectionSettings, directory: Path) -> Engine:
    if section.engine == "memory":
        from retinue_server.leaderelection.engines.memory import MemoryEngine  # noqa: PLC0415 - the chosen engine only

        return MemoryEngine()
    if section.engine == "etcd":
        return _etcd(section.etcd)
    if section.engine == "postgres":
        return _postgres(section.postgres)
    if section.engine == "kubernetes":
        return _kubernetes(section)
    try:
        from retinue_server.leaderelection.engines.sqlite import SqliteEngine  # noqa: PLC0415 - the chosen engine only
    except ImportError as error:
        raise ConfigError("cannot use engine sqlite: install it with pip install 'retinue-server[sqlite]'") from error
    return SqliteEngine(section.sqlite.path or directory / "elections.db", fatal)


def _etcd(section: EtcdSettings) -> Engine:
    from retinue_server.leaderelection.engines.etcd.engine import EtcdEngine  # noqa: PLC0415 - the chosen engine only

    prefix = section.prefix.strip("/")
    if not section.endpoints or not prefix:
        raise ConfigError("cannot use leaderelection.etcd: endpoints and prefix must not be empty")
    for endpoint in section.endpoints:
        if not _ENDPOINT.fullmatch(endpoint):
            raise ConfigError(
                f"cannot use leaderelection.etcd.endpoints: {endpoint} is not HOST:PORT; with ca_file it is TLS"
            )
    return EtcdEngine(section.endpoints, prefix=prefix, credentials=_credentials(section))


def _credentials(section: EtcdSettings) -> ChannelCredentials | None:
    if section.ca_file is not None:
        files = UpstreamTls(ca_file=section.ca_file, cert_file=section.cert_file, key_file=section.key_file)
        return tls.channel_credentials(files)
    if section.cert_file is not None or section.key_file is not None:
        raise ConfigError("cannot use leaderelection.etcd.cert_file: TLS needs ca_file, too")
    return None


def _postgres(said: PostgresSettings) -> Engine:
    try:
        from retinue_server.leaderelection.engines.postgres import PostgresEngine  # noqa: PLC0415 - the chosen one only
    except ImportError as error:
        raise ConfigError(
            "cannot use engine postgres: install it with pip install 'retinue-server[postgres]'"
        ) from error
    try:
        return PostgresEngine(
            said.url,
            password_file=said.password_file,
            schema=said.schema,
            prepared_statements=said.prepared_statements,
            listen_url=said.listen_url,
        )
    except ValueError as error:
        raise ConfigError(f"cannot use leaderelection.postgres: {error}") from None


def _kubernetes(section: LeaderElectionSettings) -> Engine:
    try:
        from retinue_server.leaderelection.engines.kubernetes import KubernetesEngine  # noqa: PLC0415 - the chosen one
    except ImportError as error:
        raise ConfigError(
            "cannot use engine kubernetes: install it with pip install 'retinue-server[kubernetes]'"
        ) from error
    said = section.kubernetes
    return KubernetesEngine(
        kubeconfig=said.kubeconfig,
        namespace=said.namespace,
        create=said.create,
        watch_namespace=said.watch_namespace,
        names=section.elections,
    )
