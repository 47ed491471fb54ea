"""Runs the pods of a kustomize overlay with podman, and does what a kubelet does and podman does not.

That is: secrets, config maps and empty directories laid out with a kubelet's owners and modes; native
sidecars started before the app behind their startup probes, and stopped after it; gRPC probes, asked
from outside the pod; preStop hooks; grace periods; the names of services; the variable by which a
process knows that it is in a pod. Restarting a container that died is podman's own doing.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[2]
PODMAN = ROOT / "deploy/image/podman-here.sh"
NOBODY = 65532
"""The user and group of the manifests."""

Manifest = dict[str, Any]


class PodError(Exception):
    """A pod that did not do what its manifest asks for; the message has the logs."""


def podman(*words: str | Path, check: bool = True, stdin: str | None = None, timeout: float = 240) -> str:
    """Runs podman and gives its output; raises PodError with its complaint."""
    done = subprocess.run([PODMAN, *words], input=stdin, capture_output=True, text=True, check=False, timeout=timeout)
    if check and done.returncode:
        raise PodError(f"podman {' '.join(map(str, words))}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()


def kubectl() -> str | None:
    """The kubectl beside this Python, or on PATH."""
    beside = shutil.which("kubectl", path=Path(sys.executable).parent)
    return beside or shutil.which("kubectl")


def render(overlay: Path) -> list[Manifest]:
    """The manifests of an overlay."""
    command = [kubectl() or "kubectl", "kustomize", str(overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    if done.returncode:
        raise PodError(f"cannot render {overlay}: {done.stderr.strip()}")
    return list(yaml.safe_load_all(done.stdout))


def await_true(claim: Callable[[], bool], what: str, *, within: float = 120, period: float = 0.1) -> None:
    """Asks until it holds; raises PodError after `within` seconds."""
    end = time.monotonic() + within
    while not claim():
        if time.monotonic() > end:
            raise PodError(f"cannot see in {within} s that {what}")
        time.sleep(period)


def probe(address: str, settings: Manifest) -> bool:
    """Asks once, as a kubelet does: by gRPC, without TLS and tokens. Another kind of probe is a KeyError."""
    target = f"{address}:{settings['grpc']['port']}"
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=settings["grpc"].get("service", ""))
        try:
            reply = stub.Check(request, timeout=settings.get("timeoutSeconds", 1))
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


@dataclass
class Pod:
    """A pod that podman has; its containers are named as in the manifest."""

    name: str
    spec: Manifest
    sidecars: Sequence[str]
    volumes: Sequence[Manifest] = ()
    """As the manifest says."""
    address: str = ""

    def start(self) -> None:
        """Sidecars in order, each behind its startup probe, then the app's containers."""
        for name in (*self.sidecars, *self._mains()):
            podman("start", self.container(name))
            self.address = self.address or self._find_address()
            self._await_probe(name, "startupProbe")

    def await_ready(self, within: float = 120) -> None:
        """Waits until every readiness probe says so."""
        for name in (*self.sidecars, *self._mains()):
            self._await_probe(name, "readinessProbe", within)

    def stop(self) -> None:
        """preStop hooks; then SIGTERM to the app within the grace; then to the sidecars, last one first."""
        end = time.monotonic() + self.spec.get("terminationGracePeriodSeconds", 30)
        order = (*self._mains(), *reversed(self.sidecars))
        for name in order:
            if hook := self._find(name).get("lifecycle", {}).get("preStop"):
                self.run(name, *hook["exec"]["command"])
        for name in order:
            grace = max(2, round(end - time.monotonic()))  # a kubelet leaves sidecars two seconds at least
            podman("stop", "-t", str(grace), self.container(name), timeout=grace + 120)

    def crash(self, name: str) -> None:
        """SIGKILL to a container's process, and waits until podman has started it again."""
        before = int(self._inspect(name, "{{.RestartCount}}"))
        os.kill(int(self._inspect(name, "{{.State.Pid}}")), signal.SIGKILL)
        await_true(lambda: int(self._inspect(name, "{{.RestartCount}}")) > before, f"{self.name}/{name} starts again")

    def run(self, name: str, *command: str, check: bool = True, timeout: float = 240) -> str:
        """Runs a command in a container and gives its output."""
        return podman("exec", self.container(name), *command, check=check, timeout=timeout)

    def exit_code(self, name: str) -> int:
        """How a container's process ended."""
        return int(self._inspect(name, "{{.State.ExitCode}}"))

    def ended(self, name: str) -> int:
        """When a container's process ended, in nanoseconds."""
        return int(self._inspect(name, "{{.State.FinishedAt.UnixNano}}"))

    def container(self, name: str) -> str:
        """podman's name for it."""
        return f"{self.name}-{name}"

    def logs(self) -> str:
        """The last lines of every container."""
        names = [container["name"] for container in self.spec["containers"]]
        return "\n".join(f"--- {self.name}/{name}\n{self._logs(name)}" for name in names)

    def _logs(self, name: str) -> str:
        words = [str(PODMAN), "logs", "--tail", "40", self.container(name)]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        return done.stdout

    def _mains(self) -> list[str]:
        return [c["name"] for c in self.spec["containers"] if c["name"] not in self.sidecars]

    def _find(self, name: str) -> Manifest:
        return next(c for c in self.spec["containers"] if c["name"] == name)

    def _await_probe(self, name: str, kind: str, within: float = 120) -> None:
        if settings := self._find(name).get(kind):
            try:
                await_true(lambda: probe(self.address, settings), f"{kind} of {name}", within=within)
            except PodError as error:
                raise PodError(f"{error}\n{self.logs()}") from None

    def _inspect(self, name: str, template: str) -> str:
        return podman("inspect", "--format", template, self.container(name))

    def _find_address(self) -> str:
        infra = podman("pod", "inspect", "--format", "{{.InfraContainerID}}", self.name)
        addresses = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        return podman("inspect", "--format", addresses, infra)


@dataclass
class Cluster:
    """A network with the pods of one overlay; leaves nothing behind when it is closed.

    `files` are secrets and config maps that the overlay leaves to its user: name -> file name -> content. `images` are
    those that are not `image`, by their names in the overlay.
    """

    overlay: Path
    image: str
    files: Mapping[str, Mapping[str, str]]
    images: Mapping[str, str] = field(default_factory=dict)
    suffix: str = field(default_factory=lambda: secrets.token_hex(3))

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="retinue-pods-"))
        self._directory.chmod(0o711)
        self.manifests = render(self.overlay)
        self.pods: list[Pod] = []
        self._volumes: list[str] = []
        self.network = f"retinue-{self.suffix}"
        podman("network", "create", "--disable-dns", self.network)
        subnet = podman("network", "inspect", "--format", "{{(index .Subnets 0).Subnet}}", self.network)
        free = islice(ip_network(subnet).hosts(), 100, None)
        services = [m for m in self.manifests if m["kind"] == "Service"]
        self._services = {m["metadata"]["name"]: [str(next(free)) for _ in range(self._pods_of(m))] for m in services}
        self._taken: dict[str, str] = {}
        return self

    def __exit__(self, *_: object) -> None:
        for pod in list(self.pods):
            self.remove(pod)
        for volume in self._volumes:
            podman("volume", "rm", "--force", volume)
        podman("network", "rm", "--force", self.network)
        shutil.rmtree(self._directory)

    def pod(self, workload: str, name: str = "", containers: Mapping[str, Manifest] | None = None) -> Pod:
        """Makes and starts one pod of a Deployment; `containers` replaces fields of containers by name.

        A pod that a service selects gets the service's address: there may be one such pod at a time. A headless
        service has an address for each replica; its name is all of them, those that no pod has, too.
        """
        template = self._find("Deployment", workload)["spec"]["template"]
        pod = self._make(f"{name or workload}-{self.suffix}", template, containers or {})
        self.pods.append(pod)
        try:
            self._play(pod, template["metadata"]["labels"])
            pod.start()
        except PodError as error:
            raise PodError(f"cannot start {pod.name}: {error}\n{pod.logs()}") from None
        return pod

    def remove(self, pod: Pod) -> None:
        """Takes a pod away, without a word to it unless it was stopped before: as when its node dies."""
        podman("pod", "rm", "--force", "--time", "0", "--ignore", pod.name)
        self.pods.remove(pod)
        self._taken = {address: name for address, name in self._taken.items() if name != pod.name}

    def update(self, config_map: str, files: Mapping[str, str]) -> None:
        """Changes files of a config map under the pods that mount it, as a kubelet does within a minute."""
        content = self._find("ConfigMap", config_map)["data"]
        content.update(files)
        mounted = {(pod.name, v["name"]) for pod in self.pods for v in pod.volumes if _source(v) == config_map}
        for pod_name, volume in mounted:
            for file, text in files.items():
                path = self._directory / pod_name / volume / file
                new = path.with_name(f".{file}")
                new.write_text(text)
                _hand_over(new, 0o644)
                new.rename(path)

    def logs(self) -> str:
        """The last lines of every pod that is still there."""
        return "\n".join(pod.logs() for pod in self.pods)

    def _find(self, kind: str, name: str) -> Manifest:
        return next(m for m in self.manifests if (m["kind"], m["metadata"]["name"]) == (kind, name))

    def _make(self, name: str, template: Manifest, containers: Mapping[str, Manifest]) -> Pod:
        spec: Manifest = template["spec"]
        spec = spec | {
            "hostAliases": [{"ip": ip, "hostnames": [name]} for name, ips in self._services.items() for ip in ips],
            "containers": [self._container(c) | containers.get(c["name"], {}) for c in spec["containers"]],
            "volumes": [self._volume(name, volume) for volume in spec.get("volumes", [])],
        }
        annotations = template["metadata"].get("annotations", {})
        return Pod(name, spec, annotations.get("sidecars", "").split(), template["spec"].get("volumes", []))

    def _container(self, said: Manifest) -> Manifest:
        env = [*said.get("env", []), {"name": "KUBERNETES_SERVICE_HOST", "value": "10.96.0.1"}]
        return said | {"image": self.images.get(said["image"], self.image), "env": env}

    def _play(self, pod: Pod, labels: Mapping[str, str]) -> None:
        metadata = {"name": pod.name, "labels": labels}
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod.spec}
        options = ["--start=false", "--network", self.network]
        for service in self._services_of(labels):
            address = next(one for one in self._services[service] if one not in self._taken)
            self._taken[address] = pod.name
            # One hardware address, too, or the other pods' neighbour tables would point to the pod before.
            mac = f"02:00:{int(ip_address(address)):08x}"
            options += ["--ip", address, "--mac-address", ":".join(re.findall("[0-9a-f]{2}", mac))]
        podman("kube", "play", *options, "-", stdin=json.dumps(manifest))

    def _volume(self, pod: str, volume: Manifest) -> Manifest:
        if claim := volume.get("persistentVolumeClaim"):
            return volume | {"persistentVolumeClaim": {"claimName": self._claim(claim["claimName"])}}
        path = self._directory / pod / volume["name"]
        shutil.rmtree(path, ignore_errors=True)  # of an earlier pod of the name
        path.mkdir(parents=True)
        if "emptyDir" in volume:
            _hand_over(path, 0o2777)
        else:
            self._lay_out(path, volume)
        return {"name": volume["name"], "hostPath": {"path": str(path), "type": "Directory"}}

    def _claim(self, name: str) -> str:
        """podman makes the volume when it first meets the name; it outlives the pod."""
        claim = f"retinue-{name}-{self.suffix}"
        if claim not in self._volumes:
            self._volumes.append(claim)
        return claim

    def _lay_out(self, path: Path, volume: Manifest) -> None:
        """A secret or config map as a kubelet mounts it where fsGroup is set."""
        source = volume.get("secret") or volume["configMap"]
        for file, content in self._content(source.get("secretName") or source["name"]).items():
            (path / file).write_text(content)
            _hand_over(path / file, source.get("defaultMode", 0o644))
        _hand_over(path, 0o2755)

    def _content(self, name: str) -> Mapping[str, str]:
        if name in self.files:
            return self.files[name]
        data: dict[str, str] = self._find("ConfigMap", name)["data"]
        return data

    def _pods_of(self, service: Manifest) -> int:
        """How many addresses a service has."""
        if service["spec"].get("clusterIP") != "None":
            return 1
        wanted = service["spec"]["selector"].items()
        templates = (m["spec"] for m in self.manifests if m["kind"] == "Deployment")
        return sum(spec["replicas"] for spec in templates if wanted <= spec["template"]["metadata"]["labels"].items())

    def _services_of(self, labels: Mapping[str, str]) -> Iterator[str]:
        for manifest in self.manifests:
            if manifest["kind"] == "Service" and manifest["spec"]["selector"].items() <= labels.items():
                yield manifest["metadata"]["name"]


def _source(volume: Manifest) -> str:
    """The config map of a volume; empty of others."""
    return str(volume.get("configMap", {}).get("name", ""))


def _hand_over(path: Path, mode: int) -> None:
    """Owner root, the manifests' group: what fsGroup does."""
    os.chown(path, 0, NOBODY)
    path.chmod(mode)
