"""What an API server answers to scripts of requests. The transcripts are what the real one answered.

PYTHONPATH=tests python -m support.kubernetes.transcript    asks the real one anew, and writes them
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from support.kubernetes.api import Answer, Api

FILE = Path(__file__).with_name("transcript.json")
SLICES_FILE = Path(__file__).with_name("transcript_endpointslices.json")
_TIME = "2026-01-01T00:00:00.123456Z"
_SPOKEN_OTHERWISE = "managedFields", "message", "causes"
"""Not compared: texts for people, and who wrote what. Neither is a list's version, which others raise."""

Body = dict[str, Any]


class _Script:
    """Plays requests, and keeps what was said without what differs from run to run."""

    def __init__(self, api: Api, resource: str = "leases") -> None:
        self._api, self._namespace, self._resource = api, api.namespace(), resource
        self._names: dict[str, str] = {self._namespace: "NAMESPACE"}
        self.kept: list[Any] = []

    def ask(self, method: str, name: str = "", body: object = None, **params: str) -> Body:
        """One request; what was said, if it was one object."""
        path = f"{self._namespace}/{self._resource}{'/' if name else ''}{name}"
        answer = self._api.request(method, path, body, **params)
        asked = f"{method} {name or self._resource}"
        self.kept.append({"asked": asked, "code": answer.code, "said": self._plain(answer)})
        return answer.said[0] if len(answer.said) == 1 else {}

    def watch(self, version: str = "", name: str = "", labels: str = "") -> None:
        """All events of a second."""
        params = {"watch": "true", "timeoutSeconds": "1"}
        params |= {"resourceVersion": version} if version else {}
        params |= {"labelSelector": labels} if labels else {}
        self.ask("GET", **params, **({"fieldSelector": f"metadata.name={name}"} if name else {}))

    def _plain(self, answer: Answer) -> list[Any]:
        return [self._renamed(part) for part in answer.said]

    def _renamed(self, part: Any) -> Any:
        if isinstance(part, dict):
            left = {*_SPOKEN_OTHERWISE, *(["metadata"] if str(part.get("kind", "")).endswith("List") else [])}
            return {key: self._value(key, part[key]) for key in sorted(part.keys() - left)}
        return [self._renamed(each) for each in part] if isinstance(part, list) else part

    def _value(self, key: str, said: Any) -> Any:
        if not isinstance(said, str):
            return self._renamed(said)
        if key == "creationTimestamp":
            return re.sub(r"\d", "0", said)
        if key in ("uid", "resourceVersion"):
            return self._names.setdefault(said, f"{key} {len(self._names)}")
        return self._names.get(said, said)

    def end(self) -> None:
        """Removes what was made."""
        self._api.remove(self._namespace)


def play(api: Api) -> list[Any]:
    """What it answers."""
    script = _Script(api)
    try:
        first = _create(script)
        last = _replace(script, first)
        _refused(script, last)
        script.ask("GET")
        script.ask("GET", fieldSelector="metadata.name=b")
        script.watch()
        _delete(script, last)
        script.watch(first["metadata"]["resourceVersion"])
        script.watch(first["metadata"]["resourceVersion"], "a")
        script.watch("", "none")
    finally:
        script.end()
    return script.kept


def play_slices(api: Api) -> list[Any]:
    """What it answers about EndpointSlices."""
    script = _Script(api, "endpointslices")
    try:
        first = _create_slices(script)
        for selector in _SELECTORS:
            script.ask("GET", labelSelector=selector)
        _change_slices(script, first)
        version = first["metadata"]["resourceVersion"]
        for labels in ("", f"{_SERVICE}=x", f"{_SERVICE} in (y)"):
            script.watch(version, labels=labels)
        script.watch(labels=_SERVICE)
    finally:
        script.end()
    return script.kept


_SERVICE = "kubernetes.io/service-name"
_SELECTORS = (_SERVICE, f"{_SERVICE}=x", f"{_SERVICE} in (x)", f"{_SERVICE} in (x,y)", f"{_SERVICE} in (z)")


def _slice(name: str, service: str, *addresses: str, **parts: object) -> Body:
    kind = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4"}
    meta = {"name": name, "labels": {_SERVICE: service} if service else {}}
    return {**kind, "metadata": meta, "endpoints": [{"addresses": [one]} for one in addresses], **parts}


def _create_slices(script: _Script) -> Body:
    script.ask("GET", "a")
    first = script.ask("POST", "", _slice("a", "x", "10.0.0.1", ports=[{"port": 80}, {"name": "b", "port": 81}]))
    pod = {"kind": "Pod", "name": "p", "namespace": "n", "uid": "mine"}
    state = {"ready": False, "serving": True, "terminating": True}
    endpoint = {"addresses": ["2001:db8::1"], "conditions": state, "targetRef": pod}
    script.ask("POST", "", _slice("b", "x", addressType="IPv6", endpoints=[endpoint], ports=[]))
    script.ask("POST", "", {**_slice("c", "y"), "endpoints": None})
    script.ask("POST", "", _slice("d", "", "10.0.0.2"))
    script.ask("POST", "", _slice("a", "x"))
    script.ask("POST", "", _slice("e", "x", addressType="IPv5"))
    script.ask("POST", "", _slice("e", "x", endpoints=[{"addresses": []}]))
    script.ask("POST", "", _slice("e", "x", endpoints=[{"addresses": "10.0.0.1"}]))
    return first


def _change_slices(script: _Script, first: Body) -> None:
    script.ask("PUT", "a", first)  # nothing changes
    second = script.ask("PUT", "a", {**first, "endpoints": [{"addresses": ["10.0.0.3"]}]})
    script.ask("PUT", "a", first)  # stale
    script.ask("PUT", "a", {**_with(second, resourceVersion=None), "endpoints": []})
    script.ask("PUT", "c", _slice("c", "x", "10.0.0.4"))  # another Service's
    script.ask("PUT", "new", _slice("new", "x"))
    script.ask("DELETE", "b")
    script.ask("DELETE", "b")


def _lease(name: str, meta: Mapping[str, object] | None = None, **spec: object) -> Body:
    kind = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
    return {**kind, "metadata": {"name": name, **(meta or {})}, "spec": spec}


def _with(lease: Body, **meta: object) -> Body:
    """Other metadata; None = without."""
    return {**lease, "metadata": {key: part for key, part in {**lease["metadata"], **meta}.items() if part is not None}}


def _create(script: _Script) -> Body:
    script.ask("GET", "a")
    script.ask("DELETE", "a")
    notes = {"annotations": {"x/y": "é"}, "labels": {}, "uid": "mine", "creationTimestamp": "2001-01-01T00:00:00Z"}
    spec = {"holderIdentity": "", "leaseDurationSeconds": 5, "renewTime": _TIME, "unknown": 1}
    first = script.ask("POST", "", {**_lease("a", notes, **spec), "other": 3})
    script.ask("POST", "", _lease("a"))
    script.ask("GET", "a")
    script.ask("PUT", "b", _lease("b"))
    script.ask("PUT", "c", _lease("c", {"resourceVersion": "1"}))
    return first


def _replace(script: _Script, first: Body) -> Body:
    script.ask("PUT", "a", first)  # nothing changes, nor does the version
    changed = {"holderIdentity": "h", "leaseDurationSeconds": 1, "leaseTransitions": 0, "acquireTime": _TIME}
    second = script.ask("PUT", "a", {**_with(first, annotations={"k": "v"}), "spec": changed})
    script.ask("PUT", "a", first)  # stale
    null = {"holderIdentity": None, "renewTime": None}
    return script.ask("PUT", "a", {**_with(second, annotations={}, namespace=None, uid=None), "spec": null})


def _refused(script: _Script, last: Body) -> None:
    for wrong in _wrong(last):
        script.ask("PUT", "a", wrong)
    script.ask("POST", "", _lease("Upper_"))
    script.ask("POST", "", _lease("d", {"resourceVersion": "1"}))
    script.ask("POST", "", _lease("d", {"namespace": "elsewhere"}))
    script.ask("GET", "a")


def _wrong(last: Body) -> Iterator[Body]:
    yield _with(last, resourceVersion=None)
    yield _with(last, uid="another")
    yield _with(last, uid="another", resourceVersion=None)
    yield _with(last, name="another")
    yield _with(last, namespace="elsewhere")
    yield _with(last, annotations={"k": 3})
    for spec in ({"leaseDurationSeconds": 0}, {"leaseDurationSeconds": "3"}, {"leaseTransitions": -1}):
        yield {**last, "spec": spec}
    for time in ("", "nonsense", "2026-01-01T00:00:00Z", "2026-01-01T00:00:00.1Z", "2026-01-01T00:00:00.123456789Z"):
        yield {**last, "spec": {"renewTime": time}}


def _delete(script: _Script, last: Body) -> None:
    script.ask("DELETE", "a")
    script.ask("DELETE", "a")
    script.ask("PUT", "a", last)  # it was another
    script.ask("PUT", "a", _with(last, uid=None))  # made anew


if __name__ == "__main__":
    from support.kubernetes.server import shared

    with shared(str(os.getpid())) as cluster:
        for file, kept in ((FILE, play(cluster)), (SLICES_FILE, play_slices(cluster))):
            file.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
