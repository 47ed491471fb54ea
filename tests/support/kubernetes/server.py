"""Runs kube-apiserver on etcd: no nodes, no controllers; RBAC decides, tokens stand in a file.

The first of a run who needs it starts it, the last stops it. Both listen on free ports of loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from support.kubernetes.api import Api, new_name, write_kubeconfig
from support.kubernetes.build import built
from support.postgres import free_port, locked

_START = 150.0
_ADMIN = "admin-token"
_TOKENS = f'{_ADMIN},admin,1,"system:masters"\n'


class Cluster(Api):
    """A real Kubernetes, whoever runs it."""

    def kubectl(self, *args: str, given: str = "") -> str:
        """Runs kubectl as the kubeconfig's user; what it prints."""
        program = shutil.which("kubectl", path=Path(sys.executable).parent) or "kubectl"
        command = [program, f"--kubeconfig={self.kubeconfig}", *args]
        done = subprocess.run(command, input=given, check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{args}: {done.stderr}"
        return done.stdout

    def kubeconfig_of(self, account: str, namespace: str, path: Path) -> Path:
        """Writes a kubeconfig for a service account."""
        said = json.loads(self.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
        said["users"][0]["user"] = {"token": self.kubectl("create", "token", account, "-n", namespace).strip()}
        path.write_text(json.dumps(said))
        return path

    def namespace(self) -> str:
        name = new_name()
        self.kubectl("create", "namespace", name)
        return name

    def remove(self, namespace: str) -> None:
        self.kubectl("delete", "namespace", namespace, "--wait=false")


class Kubernetes(Cluster):
    """A server in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / "kubeconfig")
        self.directory = directory
        self.api_port, self.etcd_port = json.loads((directory / "ports").read_text())

    @classmethod
    def create(cls, directory: Path) -> Kubernetes:
        """Makes a cluster and starts it."""
        programs = built()
        directory.mkdir(parents=True, exist_ok=True)
        ports = free_port(), free_port()
        (directory / "ports").write_text(json.dumps(ports))
        (directory / "programs").write_text(str(programs))
        (directory / "tokens.csv").write_text(_TOKENS)
        key = ["openssl", "genrsa", "-out", str(directory / "accounts.key"), "2048"]
        subprocess.run(key, check=True, capture_output=True)
        made = cls(directory)
        try:
            made.start_etcd()
            made.start_api()
        except BaseException:
            made.stop()  # or it would stand in the way of the next
            raise
        made._write_kubeconfig()
        return made

    def start_etcd(self) -> None:
        """Starts etcd."""
        client, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{free_port()}"
        urls = [f"--listen-client-urls={client}", f"--advertise-client-urls={client}", f"--listen-peer-urls={peer}"]
        self._start("etcd", f"--data-dir={self.directory / 'etcd-data'}", *urls, "--log-level=error")

    def start_api(self) -> None:
        """Starts the API server and waits until it is ready."""
        key = self.directory / "accounts.key"
        self._start(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            f"--cert-dir={self.directory / 'certs'}",
            f"--secure-port={self.api_port}",
            "--bind-address=127.0.0.1",
            f"--token-auth-file={self.directory / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--disable-admission-plugins=ServiceAccount",
        )
        end = time.monotonic() + _START
        while not self._is_ready():
            assert time.monotonic() < end, (self.directory / "kube-apiserver.log").read_text()[-2000:]
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        url = f"https://127.0.0.1:{self.api_port}/readyz"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {_ADMIN}"})
        with contextlib.suppress(OSError):
            trusted = ssl.create_default_context(cafile=self._certificate)
            with urllib.request.urlopen(request, timeout=2, context=trusted) as answer:
                return bool(answer.read() == b"ok")
        return False

    @property
    def _certificate(self) -> str:
        return str(self.directory / "certs" / "apiserver.crt")

    def _write_kubeconfig(self) -> None:
        write_kubeconfig(self.kubeconfig, f"https://127.0.0.1:{self.api_port}", self._certificate, _ADMIN)

    def _start(self, program: str, *args: str) -> None:
        path = Path((self.directory / "programs").read_text()) / program
        beside = 'log=$1; shift; setsid "$@" </dev/null >>"$log" 2>&1 & echo $!'  # it must outlive this worker
        command = ["sh", "-c", beside, "sh", str(self.directory / f"{program}.log"), str(path), *args]
        pid = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        (self.directory / f"{program}.pid").write_text(pid)

    def signal(self, program: str, number: signal.Signals) -> None:
        """Sends a signal to `etcd` or `kube-apiserver`."""
        os.kill(self._pid(program), number)

    def _pid(self, program: str) -> int:
        return int((self.directory / f"{program}.pid").read_text())

    def kill(self, program: str) -> None:
        """Kills one of them and waits until it is gone."""
        self.signal(program, signal.SIGKILL)
        while _runs(self._pid(program)):
            time.sleep(0.01)

    def stop(self) -> None:
        """Ends both."""
        for program in ("kube-apiserver", "etcd"):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                self.kill(program)


def _runs(pid: int) -> bool:
    """Whether any of its threads does: the first may end before those that hold the port."""
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" or len(list(Path(f"/proc/{pid}/task").iterdir())) > 1
    return False


@contextlib.contextmanager
def shared(run_id: str) -> Iterator[Kubernetes]:
    """The server of this run (the workers of pytest-xdist have one id)."""
    home = Path(tempfile.gettempdir()) / f"retinue-kubernetes-{run_id}"
    users = home / "users"
    users.mkdir(parents=True, exist_ok=True)
    mine = users / str(os.getpid())
    with locked(home):
        mine.touch()
        where = home / "server"
        server = Kubernetes(where) if (where / "kubeconfig").exists() else Kubernetes.create(where)
    try:
        yield server
    finally:
        with locked(home):
            mine.unlink()
            last = not any(users.iterdir())
            if last:
                server.stop()
        if last:
            shutil.rmtree(home, ignore_errors=True)
