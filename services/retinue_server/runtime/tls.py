"""Certificates and keys, checked before a listener takes them."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import grpc

from retinue_server.runtime.addresses import StartError

if TYPE_CHECKING:
    from pathlib import Path

    from retinue_server.runtime.config import Tls, UpstreamTls


def server_credentials(settings: Tls) -> grpc.ServerCredentials:
    """What a gRPC listener shows, and whom it admits; raises StartError naming the file that is wrong."""
    check(settings)
    client_ca = settings.client_ca_file
    return grpc.ssl_server_credentials(
        [(_read(settings.key_file), _read(settings.cert_file))],
        root_certificates=_read(client_ca) if client_ca else None,
        require_client_auth=client_ca is not None,
    )


def channel_credentials(settings: UpstreamTls) -> grpc.ChannelCredentials:
    """How a relay checks its upstream; raises StartError naming the file that is wrong."""
    _check_pair(settings.cert_file, settings.key_file)
    if settings.ca_file:
        _check_authority("CA", settings.ca_file)  # gRPC would take an empty file for the system's authorities
    return grpc.ssl_channel_credentials(
        root_certificates=_read(settings.ca_file) if settings.ca_file else None,
        private_key=_read(settings.key_file) if settings.key_file else None,
        certificate_chain=_read(settings.cert_file) if settings.cert_file else None,
    )


def check(settings: Tls) -> None:
    """Raises StartError when a certificate and its key, or the client CA, can't be used."""
    _check_pair(settings.cert_file, settings.key_file)
    if settings.client_ca_file:
        _check_authority("client CA", settings.client_ca_file)


def _check_authority(what: str, path: Path) -> None:
    try:
        ssl.create_default_context(cafile=str(path))
    except (OSError, ValueError) as error:
        raise StartError(f"cannot use the {what} {path}: {getattr(error, 'reason', None) or error}") from None


def _check_pair(certificate: Path | None, key: Path | None) -> None:
    if (certificate is None) != (key is None):
        raise StartError("cannot use TLS: cert_file and key_file go together")
    if certificate is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        raise StartError(f"cannot use the certificate {certificate} with the key {key}: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"cannot read {path}: {error.strerror}") from None
