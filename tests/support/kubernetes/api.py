"""What tests need of an API server, whether real or emulated."""

from __future__ import annotations

import itertools
import json
import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple

from lightkube import KubeConfig
from lightkube.config.client_adapter import Client, ConnectionParams

APIS = {
    "leases": "/apis/coordination.k8s.io/v1/namespaces",
    "endpointslices": "/apis/discovery.k8s.io/v1/namespaces",
    "pods": "/api/v1/namespaces",
}
"""Where which resources are."""
_numbers = itertools.count()


class Answer(NamedTuple):
    """To one request."""

    code: int
    said: list[Any]
    """One object; of a watch, the events."""


class Api:
    """An API server, as its kubeconfig says."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig

    def request(self, method: str, path: str, body: object = None, **params: str) -> Answer:
        """Asks for `NAMESPACE/RESOURCE` or `NAMESPACE/RESOURCE/NAME` as the kubeconfig's user."""
        config = KubeConfig.from_file(self.kubeconfig).get()
        assert config is not None
        with Client(config, ConnectionParams(trust_env=False)) as client:
            answer = client.request(method, f"{APIS[path.split('/')[1]]}/{path}", json=body, params=params)
        return Answer(answer.status_code, [json.loads(line) for line in answer.text.splitlines() if line])

    def lease(self, namespace: str, name: str) -> dict[str, Any]:
        """That Lease as it is now."""
        code, (said,) = self.request("GET", f"{namespace}/leases/{name}")
        assert code == 200, said
        lease: dict[str, Any] = said
        return lease

    def replace(self, namespace: str, lease: dict[str, Any]) -> None:
        """Stores what was made from the latest."""
        code, said = self.request("PUT", f"{namespace}/leases/{lease['metadata']['name']}", lease)
        assert code == 200, said

    def create_pod(self, namespace: str, name: str, **labels: str) -> None:
        """One that nobody runs."""
        spec = {"containers": [{"name": "app", "image": "none"}]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}
        code, said = self.request("POST", f"{namespace}/pods", pod)
        assert code == 201, said

    def labels(self, namespace: str, name: str) -> dict[str, str]:
        """Of a pod."""
        code, (said,) = self.request("GET", f"{namespace}/pods/{name}")
        assert code == 200, said
        labels: dict[str, str] = said["metadata"].get("labels") or {}
        return labels

    def namespace(self) -> str:
        """A new one of its own."""
        raise NotImplementedError

    def remove(self, namespace: str) -> None:
        """Removes it, soon."""
        raise NotImplementedError


def new_name() -> str:
    """A namespace's that nobody has."""
    return f"t-{os.getpid()}-{next(_numbers)}-{secrets.token_hex(3)}"


def write_kubeconfig(path: Path, server: str, authority: str, token: str) -> None:
    """Writes a kubeconfig of one cluster and one user."""
    said = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "it",
        "clusters": [{"name": "it", "cluster": {"server": server, "certificate-authority": authority}}],
        "users": [{"name": "it", "user": {"token": token}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
    }
    path.write_text(json.dumps(said))
