"""What the tests of the ambassador's pods share: an app, the servers behind its localhost, what both say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from e2e.pods import Cluster, PodError

LIBRARY = "/usr/lib/python3.11"
"""Real files that servers and apps have, as they are of one image."""
LOAD = f"cd {LIBRARY} && memccp --servers=127.0.0.1:11211 *.py"
READ = f"cd {LIBRARY} && memccat --servers=127.0.0.1:11211 *.py | sha256sum"
WHOLE = f"cd {LIBRARY} && for file in *.py; do cat $file; echo; done | sha256sum"
GET = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=5).read().decode())"


class World:
    """The pods, and what its tests ask of them."""

    def __init__(self, cluster: Cluster, servers: Mapping[str, int]) -> None:
        self.cluster = cluster
        names = [(kind, f"{kind}-{number}") for kind, count in servers.items() for number in range(count)]
        self.servers = {name: cluster.pod(kind, name) for kind, name in names}
        self.app = cluster.pod("my-app", "app")

    def kill(self, name: str) -> None:
        """A server's pod, as when its node dies."""
        self.cluster.remove(self.servers.pop(name))

    def bring_back(self, name: str) -> None:
        """A new pod in its place."""
        self.servers[name] = self.cluster.pod(name.rpartition("-")[0], name)

    def sh(self, command: str, *, check: bool = True) -> str:
        """In the app's container."""
        return self.app.run("app", "sh", "-c", command, check=check)

    def works(self, command: str) -> bool:
        """Whether it ends well there."""
        try:
            self.sh(command)
        except PodError:
            return False
        return True

    def is_cached(self) -> bool:
        """Whether all files can be read from the cache."""
        return self.sh(READ) == self.sh(WHOLE)

    def upstreams(self) -> dict[str, dict[str, Any]]:
        """What an operator sees, in the ambassador's container."""
        lines = self.app.run("ambassador", "retinue", "ambassador", "ls", "--output", "json").splitlines()
        return {row["upstream_id"]: row for row in map(json.loads, lines)}

    def stats(self, name: str) -> dict[str, Any]:
        """The counts of an upstream."""
        words = ("retinue", "ambassador", "stats", name, "--once", "--output", "json")
        found: dict[str, Any] = json.loads(self.app.run("ambassador", *words))
        return found

    def held(self) -> dict[str, int]:
        """How many keys each memcached has, as it says itself."""
        command = "memcstat --servers=127.0.0.1:11211"
        pods = {name: pod for name, pod in self.servers.items() if name.startswith("memcached")}
        told = {name: pod.run("server", "sh", "-c", command) for name, pod in pods.items()}
        return {name: int(re.findall(r"curr_items: (\d+)", text)[0]) for name, text in told.items()}

    def file(self) -> list[dict[str, Any]]:
        """What is declared now."""
        maps = (m["data"] for m in self.cluster.manifests if m["kind"] == "ConfigMap")
        (text,) = (data["upstreams.yaml"] for data in maps if "upstreams.yaml" in data)
        entries: list[dict[str, Any]] = yaml.safe_load(text)["upstreams"]
        return entries

    def declare(self, *entries: Mapping[str, Any]) -> None:
        """By the file."""
        self.write(yaml.safe_dump({"upstreams": list(entries)}))

    def write(self, text: str) -> None:
        """The file."""
        self.cluster.update("ambassador-upstreams", {"upstreams.yaml": text})

    def metrics(self) -> str:
        """Of the ambassador, as another pod reads them."""
        url = f"http://{self.app.address}:7273/metrics"
        return next(iter(self.servers.values())).run("server", "python3", "-c", GET, url)
