"""Names and units: what the source calls a thing, and what it is called here.

After Prometheus' naming practice: base units, the unit at the end of the name, `_total` added by the exposition alone.
"""

from __future__ import annotations

import re

_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_:]")
_NOT_IN_LABELS = re.compile(r"[^a-zA-Z0-9_]")
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")

UNITS: dict[str, tuple[str, float]] = {
    "ns": ("seconds", 1e-9),
    "nanoseconds": ("seconds", 1e-9),
    "us": ("seconds", 1e-6),
    "µs": ("seconds", 1e-6),
    "microseconds": ("seconds", 1e-6),
    "ms": ("seconds", 1e-3),
    "milliseconds": ("seconds", 1e-3),
    "s": ("seconds", 1.0),
    "sec": ("seconds", 1.0),
    "seconds": ("seconds", 1.0),
    "min": ("seconds", 60.0),
    "minutes": ("seconds", 60.0),
    "h": ("seconds", 3600.0),
    "hours": ("seconds", 3600.0),
    "d": ("seconds", 86400.0),
    "days": ("seconds", 86400.0),
    "By": ("bytes", 1.0),
    "bytes": ("bytes", 1.0),
    "bit": ("bytes", 0.125),
    "bits": ("bytes", 0.125),
    "kBy": ("bytes", 1e3),
    "kilobytes": ("bytes", 1e3),
    "KiBy": ("bytes", 1024.0),
    "kibibytes": ("bytes", 1024.0),
    "MBy": ("bytes", 1e6),
    "megabytes": ("bytes", 1e6),
    "MiBy": ("bytes", 1048576.0),
    "mebibytes": ("bytes", 1048576.0),
    "GBy": ("bytes", 1e9),
    "gigabytes": ("bytes", 1e9),
    "GiBy": ("bytes", 1073741824.0),
    "gibibytes": ("bytes", 1073741824.0),
    "%": ("ratio", 0.01),
    "percent": ("ratio", 0.01),
    "ratio": ("ratio", 1.0),
    "Cel": ("celsius", 1.0),
    "celsius": ("celsius", 1.0),
    "V": ("volts", 1.0),
    "volts": ("volts", 1.0),
    "J": ("joules", 1.0),
    "joules": ("joules", 1.0),
    "g": ("grams", 1.0),
    "grams": ("grams", 1.0),
    "m": ("meters", 1.0),
    "meters": ("meters", 1.0),
}
"""By the name of a unit, of UCUM or in words: the base unit and the factor to it."""

_TELLING = 3
_IN_NAMES = {
    name: to for name, to in UNITS.items() if name in ("ms", "us", "ns") or (name.islower() and len(name) > _TELLING)
}
"""What tells a unit at the end of a name, where nothing else does; `_s`, `_min` and the like mean too much."""


def metric_name(text: str) -> str:
    """What of a name can be one; empty if nothing can."""
    if _NAME.fullmatch(text):
        return text
    found = re.sub("__+", "_", _NOT_IN_NAMES.sub("_", text)).strip("_")
    return "_" + found if found[:1].isdigit() else found


def label_name(text: str) -> str:
    """What of a name can be that of a label; empty if nothing can. Two underscores in front are Prometheus' own."""
    found = _NOT_IN_LABELS.sub("_", text)
    if found.startswith("__"):
        found = found.lstrip("_")
    return "_" + found if found[:1].isdigit() else found


def based(name: str, unit: str) -> tuple[str, str, float]:
    """A name without its type's suffixes and its unit -> the name with the base unit, that unit, and the factor to
    it."""
    if not unit:
        stem, _, last = name.rpartition("_")
        if not stem or last not in _IN_NAMES:
            return name, "", 1.0
        base, factor = _IN_NAMES[last]
        return f"{stem}_{base}", base, factor
    base, factor = UNITS.get(unit, ("", 1.0))
    if not base:  # {requests}, or a unit of the app's own: the name says it or nobody does
        return name, "", 1.0
    for suffix in (unit, base, *(word for word, (to, _) in _IN_NAMES.items() if to == base)):
        name = name.removesuffix(f"_{suffix}")
    return f"{name}_{base}", base, factor
