"""What the emulated API server keeps: things, their changes, and what it refuses to keep."""

from __future__ import annotations

import asyncio
import datetime as dt
import re
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import msgspec

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_ADDRESS_TYPES = ("IPv4", "IPv6", "FQDN")

MicroTime = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$")]


class Metadata(msgspec.Struct, rename="camel", omit_defaults=True):
    """What is kept of an object's."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class Spec(msgspec.Struct, rename="camel", omit_defaults=True):
    """Of a Lease; other fields are lost, as in the real one."""

    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: MicroTime | None = None
    renew_time: MicroTime | None = None
    lease_transitions: int | None = None


class Lease(msgspec.Struct, rename="camel"):
    """As it is stored."""

    kind: str = "Lease"
    api_version: str = "coordination.k8s.io/v1"
    metadata: Metadata = msgspec.field(default_factory=Metadata)
    spec: Spec = msgspec.field(default_factory=Spec)


class Conditions(msgspec.Struct, omit_defaults=True):
    """Of an endpoint."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Reference(msgspec.Struct, omit_defaults=True):
    """To a pod."""

    kind: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""


class Endpoint(msgspec.Struct, rename="camel", omit_defaults=True):
    """Of a slice; zones, hints and nodes are lost, as they are in no real one."""

    addresses: list[str]
    conditions: Conditions = msgspec.field(default_factory=Conditions)
    target_ref: Reference | None = None


class Port(msgspec.Struct):
    """Of a slice, with the defaults that the real one gives it."""

    name: str = ""
    port: int | None = None
    protocol: str = "TCP"


class EndpointSlice(msgspec.Struct, rename="camel"):
    """As it is stored."""

    address_type: str
    kind: str = "EndpointSlice"
    api_version: str = "discovery.k8s.io/v1"
    metadata: Metadata = msgspec.field(default_factory=Metadata)
    endpoints: list[Endpoint] | None = None
    ports: list[Port] | None = None


class Pod(msgspec.Struct, rename="camel"):
    """As it is stored: its labels are what is of interest."""

    kind: str = "Pod"
    api_version: str = "v1"
    metadata: Metadata = msgspec.field(default_factory=Metadata)
    spec: dict[str, Any] = msgspec.field(default_factory=dict)


Thing = Lease | EndpointSlice | Pod


class _LabelPatch(msgspec.Struct, forbid_unknown_fields=True):
    labels: dict[str, str | None]


class _Patch(msgspec.Struct, forbid_unknown_fields=True):
    metadata: _LabelPatch


class Resource(NamedTuple):
    """A kind of things."""

    plural: str
    kind: str
    group: str
    type: type[Thing]

    @property
    def full(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def version(self) -> str:
        return f"{self.group}/v1" if self.group else "v1"


RESOURCES = {
    "leases": Resource("leases", "Lease", "coordination.k8s.io", Lease),
    "endpointslices": Resource("endpointslices", "EndpointSlice", "discovery.k8s.io", EndpointSlice),
    "pods": Resource("pods", "Pod", "", Pod),
}


class Selection(NamedTuple):
    """Which things of a namespace are asked for."""

    resource: Resource
    namespace: str
    name: str | None = None
    label: str = ""
    """Empty = whatever labels they have."""
    values: frozenset[str] | None = None
    """Of the label; None = any."""
    listed: bool = True
    """Whether a list is asked for, and not the thing of that name."""

    def has(self, thing: Thing) -> bool:
        meta = thing.metadata
        if not isinstance(thing, self.resource.type) or meta.namespace != self.namespace:
            return False
        value = (meta.labels or {}).get(self.label)
        labelled = not self.label or (value is not None and (self.values is None or value in self.values))
        return labelled and self.name in (None, meta.name)


class Event(NamedTuple):
    """A change."""

    version: int
    kind: str
    thing: Thing
    before: Thing | None


class Refusal(Exception):
    """A Status that says what failed."""

    def __init__(self, code: int, reason: str, message: str, **details: str) -> None:
        super().__init__(message)
        self.code = code
        self.status: dict[str, Any] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
        }
        self.status |= {"reason": reason} if reason else {}
        self.status |= {"details": details} if details else {}
        self.status |= {"code": code}


class Store:
    """Things, their changes, and the counter of versions; known to one thread."""

    def __init__(self) -> None:
        self.namespaces = {"default"}
        self.conflicts = 0
        self.version = 1
        self.forgotten = 0
        """Changes up to this version cannot be watched any more."""
        self.changed = asyncio.Event()
        self._things: dict[tuple[str, str, str], Thing] = {}
        self._events: list[Event] = []

    def get(self, of: Resource, namespace: str, name: str) -> Thing:
        found = self._things.get((of.plural, namespace, name))
        if found is None:
            raise _refused(of, 404, "NotFound", f'{of.full} "{name}" not found', name)
        return found

    def list(self, wanted: Selection) -> list[Thing]:
        """In the order of their names."""
        return [self._things[key] for key in sorted(self._things) if wanted.has(self._things[key])]

    def create(self, of: Resource, namespace: str, thing: Thing) -> Thing:
        meta = thing.metadata
        if namespace not in self.namespaces:
            message = f'namespaces "{namespace}" not found'
            raise Refusal(404, "NotFound", message, name=namespace, kind="namespaces")
        if meta.resource_version:
            raise Refusal(500, "", "resourceVersion should not be set on objects to be created")
        if (of.plural, namespace, meta.name) in self._things:
            raise _refused(of, 409, "AlreadyExists", f'{of.full} "{meta.name}" already exists', meta.name)
        meta.uid, meta.namespace, meta.creation_timestamp = str(uuid.uuid4()), namespace, _now()
        meta.generation = int(of.type is EndpointSlice)
        return self._store(of, "ADDED", thing)

    def put(self, of: Resource, namespace: str, thing: Thing) -> tuple[int, Thing]:
        """As made from the latest; a Lease that does not exist is created."""
        meta = thing.metadata
        before = self._things.get((of.plural, namespace, meta.name))
        uid = before.metadata.uid if before else ""
        if meta.uid not in ("", uid):
            what = f"Precondition failed: UID in precondition: {meta.uid}, UID in object meta: {uid}"
            raise _conflict(of, meta.name, what)
        if before is None:
            if of.type is EndpointSlice:
                self.get(of, namespace, meta.name)
            meta.resource_version = ""
            return 201, self.create(of, namespace, thing)
        self._check(of, before, meta)
        kept = before.metadata
        meta.uid, meta.namespace, meta.creation_timestamp = kept.uid, kept.namespace, kept.creation_timestamp
        meta.generation = kept.generation
        if before == thing:
            return 200, before
        meta.generation += int(of.type is EndpointSlice)
        return 200, self._store(of, "MODIFIED", thing)

    def patch(self, of: Resource, namespace: str, name: str, body: bytes) -> Thing:
        """Merges labels; raises Refusal for any other change."""
        before = self.get(of, namespace, name)
        try:
            said = msgspec.json.decode(body, type=_Patch).metadata.labels
        except msgspec.MsgspecError as error:
            raise Refusal(501, "NotImplemented", f"not emulated: {error}") from error
        labels = {key: value for key, value in {**(before.metadata.labels or {}), **said}.items() if value is not None}
        if labels == (before.metadata.labels or {}):
            return before
        meta = msgspec.structs.replace(before.metadata, labels=labels or None)
        return self._store(of, "MODIFIED", msgspec.structs.replace(before, metadata=meta))

    def _check(self, of: Resource, before: Thing, meta: Metadata) -> None:
        if not meta.resource_version:
            if of.type is EndpointSlice:
                meta.resource_version = before.metadata.resource_version  # the last who writes wins
                return
            message = "metadata.resourceVersion: Invalid value: 0: must be specified for an update"
            raise _refused(of, 422, "Invalid", f'{of.full} "{meta.name}" is invalid: {message}', meta.name)
        if self.conflicts or meta.resource_version != before.metadata.resource_version:
            self.conflicts = max(0, self.conflicts - 1)
            what = "the object has been modified; please apply your changes to the latest version and try again"
            raise _conflict(of, meta.name, what)

    def delete(self, of: Resource, namespace: str, name: str) -> Thing:
        thing = self.get(of, namespace, name)
        del self._things[of.plural, namespace, name]
        return self._note("DELETED", _at(self.version, thing), thing)

    def _store(self, of: Resource, kind: str, thing: Thing) -> Thing:
        key = of.plural, thing.metadata.namespace, thing.metadata.name
        before = self._things.get(key)
        self._things[key] = thing
        return self._note(kind, thing, before)

    def _note(self, kind: str, thing: Thing, before: Thing | None) -> Thing:
        self.version += 1
        thing.metadata.resource_version = str(self.version)
        self._events.append(Event(self.version, kind, thing, before))
        self.wake()
        return thing

    def wake(self) -> None:
        """Lets those go on who watch."""
        self.changed.set()
        self.changed = asyncio.Event()

    def forget(self) -> None:
        """Something else changed, and what was before it is forgotten."""
        self.version += 1
        self.forgotten = self.version

    def since(self, version: int, wanted: Selection) -> Iterator[tuple[int, str, Thing]]:
        """Changes after a version, as they look to who selects; raises Refusal if they are forgotten."""
        if version < self.forgotten:
            raise Refusal(410, "Expired", f"too old resource version: {version} ({self.forgotten})")
        for event in self._events:
            if event.version > version and (seen := _seen(event, wanted)):
                yield (event.version, *seen)


def _seen(event: Event, wanted: Selection) -> tuple[str, Thing] | None:
    """What change it is for those who see some things alone: what is no longer selected goes as it was before."""
    was = event.before is not None and wanted.has(event.before)
    if event.kind != "DELETED" and wanted.has(event.thing):
        return ("MODIFIED" if was else "ADDED"), event.thing
    return ("DELETED", _at(event.version, event.before)) if was and event.before is not None else None


def _at(version: int, thing: Thing) -> Thing:
    meta = msgspec.structs.replace(thing.metadata, resource_version=str(version))
    return msgspec.structs.replace(thing, metadata=meta)


def _refused(of: Resource, code: int, reason: str, message: str, name: str, *, kind: str = "") -> Refusal:
    return Refusal(code, reason, message, name=name, group=of.group, kind=kind or of.plural)


def _conflict(of: Resource, name: str, what: str) -> Refusal:
    message = f'Operation cannot be fulfilled on {of.full} "{name}": {what}'
    return _refused(of, 409, "Conflict", message, name)


def read(of: Resource, body: bytes, namespace: str, name: str | None) -> Thing:
    """The thing that was sent; raises Refusal if it is none, is spoiled, or is another's."""
    try:
        thing: Thing = msgspec.json.decode(body, type=of.type)
    except msgspec.MsgspecError as error:
        message = f'{of.kind} in version "v1" cannot be handled as a {of.kind}: {error}'
        raise Refusal(400, "BadRequest", message) from error
    meta = thing.metadata
    meta.labels, meta.annotations = meta.labels or None, meta.annotations or None
    if isinstance(thing, EndpointSlice):
        thing.endpoints, thing.ports = thing.endpoints or None, thing.ports or None
    if name not in (None, meta.name):
        message = f"the name of the object ({meta.name}) does not match the name on the URL ({name})"
        raise Refusal(400, "BadRequest", message)
    if meta.namespace not in ("", namespace):
        message = "the namespace of the provided object does not match the namespace sent on the request"
        raise Refusal(400, "BadRequest", message)
    if (wrong := _wrong(thing)) is not None:
        message = f'{of.kind}.{of.group} "{meta.name}" is invalid: {wrong}'
        raise _refused(of, 422, "Invalid", message, meta.name, kind=of.kind)
    return thing


def _wrong(thing: Thing) -> str | None:
    if not _NAME.fullmatch(thing.metadata.name):
        return "metadata.name: Invalid value"
    if isinstance(thing, Pod):
        return None
    return _wrong_lease(thing.spec) if isinstance(thing, Lease) else _wrong_slice(thing)


def _wrong_lease(spec: Spec) -> str | None:
    length, transitions = spec.lease_duration_seconds, spec.lease_transitions
    if length is not None and length <= 0:
        return f"spec.leaseDurationSeconds: Invalid value: {length}: must be greater than 0"
    if transitions is not None and transitions < 0:
        return f"spec.leaseTransitions: Invalid value: {transitions}: must be greater than or equal to 0"
    return None


def _wrong_slice(thing: EndpointSlice) -> str | None:
    if thing.address_type not in _ADDRESS_TYPES:
        return f'addressType: Unsupported value: "{thing.address_type}"'
    if any(not endpoint.addresses for endpoint in thing.endpoints or ()):
        return "endpoints[0].addresses: Required value: must contain at least 1 address"
    return None


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
